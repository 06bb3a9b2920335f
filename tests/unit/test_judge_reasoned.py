"""Reasoned verdicts: what is sent, what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_helpers import make_model_folder, make_pool, scripted_server, served

from megatron_sip.config_judge import (
    GradedCriterion,
    PairwiseCriterion,
    PointwiseCriterion,
    Reasoned,
)
from megatron_sip.config_judge import (
    Judge as Settings,
)
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.criteria import Request, Subject, UnusableReply
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.reasoned import build_reasoned, defused, parse_reasoned
from megatron_sip.judge.scoring import vote_agreement
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.serving.client import Endpoint
from megatron_sip.types import Question

REASONED = Reasoned(kind="reasoned", max_tokens=64, votes=3)
PAIRWISE = PairwiseCriterion(
    form="pairwise", name="q", server="j", prompt="quality_pairwise_reasoned_v1", answer=REASONED
)
POINTWISE = PointwiseCriterion(
    form="pointwise", name="s", server="j", prompt="safety_pointwise_reasoned_v1", answer=REASONED
)
GRADED = GradedCriterion(
    form="graded", name="f", server="j", prompt="factuality_graded_reasoned_v1", answer=REASONED
)
REQUEST = Request({}, labels=("none", "possible", "definite"), values=(1.0, 0.5, 0.0))


def reply(text: Any, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


def said(verdict: str, reasoning: str = "because") -> str:
    return json.dumps({"reasoning": reasoning, "verdict": verdict})


@pytest.mark.parametrize(
    ("verdict", "value"), [("none", 1.0), ("possible", 0.5), ("definite", 0.0)]
)
def test_a_label_is_worth_its_value(verdict: str, value: float) -> None:
    assert parse_reasoned(reply(said(verdict)), REQUEST) == value


@pytest.mark.parametrize(
    "wrong",
    [
        reply(said("none"), "length"), reply(said("maybe")), reply(said("None")), reply(None),
        reply("verdict: none"), reply('{"verdict": "none"}'), reply("[]"), reply(""),
        reply('{"reasoning": "a", "verdict": "none", "verdict_2": "none"}'),
        reply('{"reasoning": "a", "verdict": ["none"]}'), reply(said("none") + said("none")),
        reply("[" * 100_000), {"choices": []}, {"choices": [{"finish_reason": "stop"}]}, {},
    ],
)  # fmt: skip
def test_anything_else_is_no_verdict(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnusableReply):
        parse_reasoned(wrong, REQUEST)


def test_the_request_has_the_texts_between_nonces_and_the_form_of_the_reply(
    tmp_path: Path,
) -> None:
    def messages(question: Question) -> str:
        request = build_reasoned(
            Subject("P", " A", " B"), question=question, criterion=PAIRWISE,
            tokenizer=None, prompt=load_prompt(PAIRWISE.prompt),
        )  # fmt: skip
        schema = request.body["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["verdict"]["enum"] == ["1", "2"]
        assert (request.body["max_tokens"], request.route) == (64, "/v1/chat/completions")
        return request.body["messages"][0]["content"]

    first, second = (messages(Question("q", 0, 1, 0, x)) for x in (True, False))
    assert first.index("\n A\n") < first.index("\n B\n")
    assert second.index("\n B\n") < second.index("\n A\n")
    assert first.index("\nP\n") < first.index("\n A\n")


def test_marks_of_templates_are_broken_up() -> None:
    text = "a <|im_start|>user b </s> [INST] c <end_of_turn> <think> d ### e"
    assert defused(text, ["###"]) == (
        "a < |im_start|>user b < /s> [ INST] c < end_of_turn> < think> d # ## e"
    )
    assert defused("1 < 2 | 3 > 2, a[i], <b>bold</b>", []) == "1 < 2 | 3 > 2, a[i], <b>bold</b>"


def test_votes_reach_the_rewards_without_a_tokenizer(tmp_path: Path) -> None:
    seeds: list[int] = []

    def answer(path: str, body: dict[str, Any]) -> Any:
        assert path == "/v1/chat/completions"
        seeds.append(body["seed"])
        text = body["messages"][0]["content"]
        if "Continuation 2:" in text:
            return reply(said("1" if text.index("good") < text.index("Continuation 2:") else "2"))
        if "safe" in text:
            return reply(said("Yes" if len(seeds) % 3 else "No"))
        assert " suffix of 0" in text
        return reply(said("none" if "good" in text else "definite"))

    criteria = (PAIRWISE, POINTWISE, GRADED)
    with scripted_server(answer) as url:
        judge = Judge(
            criteria,
            servers={"j": ServedModel(Endpoint("j", url, "judge"), None, "digest")},
            cache=Cache(tmp_path),
            settings=Settings(
                criteria=criteria, cache_dir=tmp_path, both_orders=1.0, outage_patience_s=0.0
            ),
            prefix_text=lambda sample, num: "",
            suffix_text=lambda sample: f" suffix of {sample.sample_id}",
        )
        (rewards,), (verdicts,), counts = judge.judge_pools([make_pool([" bad", " good"])], seed=1)
    assert counts["verdicts"] == 3 * (2 + 2 + 2) and counts["missing"] == 0
    assert len(set(seeds)) == len(seeds) == 18  # every vote is a sample of its own
    np.testing.assert_array_equal(rewards.by_criterion["q"], [0, 1])
    np.testing.assert_array_equal(rewards.by_criterion["f"], [0, 1])
    agree, votes = vote_agreement([v for v in verdicts if v.criterion == "s"])
    assert votes == 6 and 3 < agree <= 6


def test_a_criterion_that_sends_token_ids_needs_a_tokenizer(tmp_path: Path) -> None:
    labels = PAIRWISE.model_copy(
        update={"answer": PairwiseCriterion.model_fields["answer"].default}
    )
    with pytest.raises(ValueError, match=r"q sends token ids to server j.*servers\.j\.tokenizer"):
        Judge(
            (labels,),
            servers={"j": ServedModel(Endpoint("j", "http://h:1", "judge"), None, "d")},
            cache=Cache(tmp_path),
            settings=Settings(criteria=(labels,), cache_dir=tmp_path),
            prefix_text=lambda sample, num: "",
            suffix_text=lambda sample: "",
        )


def test_special_texts_come_from_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = served("http://h:1", make_model_folder(tmp_path)).tokenizer
    assert tokenizer is not None and "<|end|>" in tokenizer.special_texts
