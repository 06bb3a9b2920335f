"""A judge that fails: what survives counts, an outage is waited for, and in the end the run stops.

The oracle of a flaky run is another judge that has the surviving verdicts in its cache and whose
server refuses all else: rewards, picks and gradients must be the same bits.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judge_helpers import (
    DROP,
    HANG,
    labels_reply,
    likelihood_reply,
    make_model_folder,
    make_pool,
    scripted_server,
    served,
)

from megatron_sip.config_judge import Bracket, LikelihoodCriterion, PairwiseCriterion
from megatron_sip.config_judge import Judge as Settings
from megatron_sip.config_objective import DpoObjective
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.servers import JudgeFailed
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.objectives import OBJECTIVES, picks_of
from megatron_sip.rows import make_rows
from megatron_sip.types import CandidatePool, PoolRewards

LIKELIHOOD = LikelihoodCriterion(form="likelihood", name="l", server="j")
PAIRWISE = PairwiseCriterion(form="pairwise", name="q", server="j", prompt="quality_pairwise_v2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


def make_judge(
    url: str | list[str], folder: Path, cache_dir: Path, *criteria: Any, **settings: Any
) -> Judge:
    urls = [url] if isinstance(url, str) else url
    names = ["j", "k", "m"][: len(urls)]
    server: Any = names[0] if len(names) == 1 else tuple(names)
    criteria = tuple(c.model_copy(update={"server": server}) for c in criteria)
    plain = {"timeout_s": 5.0, "outage_patience_s": 0.0, "both_orders": 0.0}
    return Judge(
        criteria,
        servers={name: served(u, folder) for name, u in zip(names, urls, strict=True)},
        cache=Cache(cache_dir),
        settings=Settings(criteria=criteria, cache_dir=cache_dir, **plain | settings),
        prefix_text=lambda sample, num: "Once",
        suffix_text=lambda sample: "",
    )


class Server:
    """Scores by a digest of the request; `fault` of the n-th try of a request comes first."""

    def __init__(self, folder: Path, fault: Any = lambda tries, digest: None) -> None:
        tokenizer = JudgeTokenizer(folder)
        self.labels = [tokenizer.label_id(x) for x in "12"]
        self.fault, self.tries, self.up = fault, Counter[int](), True

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        text = repr(body["prompt"]).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")
        self.tries[digest] += 1
        if not self.up:
            return (500, {}, "out of order")
        found = self.fault(self.tries[digest], digest)
        if found is not None:
            return found
        share = (digest % 997 + 1) / 999
        if "prompt_logprobs" in body:
            return likelihood_reply(body, -share)
        return labels_reply({self.labels[0]: math.log(share), self.labels[1]: math.log(1 - share)})


def pools(number: int = 6, size: int = 5) -> list[CandidatePool]:
    return [
        make_pool([f" text {i} {k} {'x' * k}" for k in range(size)], prefix=f"P{i}", sample_id=i)
        for i in range(number)
    ]


FAULTS: list[Any] = [
    HANG,
    (500, {}, "oops"),
    (429, {"Retry-After": "0"}, "slow down"),
    (200, {}, '{"choices": [{"logpr'),
    (200, {}, ""),
    (200, {}, '{"choices": []}'),
    DROP,
    (200, {}, '{"choices": [{"prompt_logprobs": [null, NaN]}]}'),
    (400, {}, "too long"),
]


def a_third_fails(tries: int, digest: int) -> Any:
    """Some requests fail for good, some at first, in every way."""
    if digest % 10 < 2 or (digest % 10 == 2 and tries == 1):
        return FAULTS[digest // 10 % len(FAULTS)]
    return None


def learned(judged: list[PoolRewards], of: list[CandidatePool]) -> tuple[Any, bytes]:
    """(picks, bits of a DPO gradient) from rewards."""
    settings = DpoObjective(name="dpo")
    picks = picks_of(of, judged, settings, seed=3)
    rows = make_rows(of, picks, length=16, pad=0)
    logprobs = torch.linspace(-2, -1, rows.tokens.numel()).reshape(rows.tokens.shape)
    logprobs.requires_grad_()
    sum(term.sum for term in OBJECTIVES["dpo"][1](logprobs, rows, settings)).backward()  # type: ignore[union-attr]
    assert logprobs.grad is not None and logprobs.grad.abs().sum() > 0
    return picks, logprobs.grad.numpy().tobytes()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_flaky_server_teaches_what_its_surviving_verdicts_teach(
    folder: Path, tmp_path: Path, seed: int
) -> None:
    of = pools()
    with scripted_server(Server(folder, a_third_fails)) as url:
        judge = make_judge(
            url, folder, tmp_path, PAIRWISE, LIKELIHOOD, timeout_s=1.0, max_missing_rate=1.0
        )
        flaky, said, counts = judge.judge_pools(of, seed=seed)
    assert 0.1 < counts["missing"] / counts["verdicts"] < 0.4 and counts["retries"] > 0
    with scripted_server(lambda path, body: (400, {}, "no")) as url:
        oracle = make_judge(url, folder, tmp_path, PAIRWISE, LIKELIHOOD, max_missing_rate=1.0)
        expected, again, _ = oracle.judge_pools(of, seed=seed)
    for a, b in zip(flaky, expected, strict=True):
        assert a.total.tobytes() == b.total.tobytes() and (a.valid == b.valid).all()
        assert a.num_missing == b.num_missing
        for name, scores in a.by_criterion.items():
            assert scores.tobytes() == b.by_criterion[name].tobytes()
    for mine, theirs in zip(said, again, strict=True):
        assert [v.score for v in mine] == [v.score for v in theirs]
    assert learned(flaky, of) == learned(expected, of)
    survived = [v for one in said for v in one if v.score is not None]
    assert all(0 <= v.score <= 1 for v in survived if v.criterion == "q" and v.score is not None)
    assert all(not np.isnan(r.total[r.valid]).any() for r in flaky)


def test_an_outage_is_waited_for_and_changes_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of, server = pools(4, 4), Server(folder)
    with scripted_server(server) as url:
        expected = make_judge(url, folder, tmp_path / "a", PAIRWISE).judge_pools(of, seed=1)
    server = Server(folder)
    server.up = False
    down_until = time.monotonic() + 2.0

    def answer(path: str, body: dict[str, Any]) -> Any:
        server.up = time.monotonic() > down_until
        return server(path, body)

    with scripted_server(answer) as url:
        judge = make_judge(
            url, folder, tmp_path / "b", PAIRWISE, timeout_s=0.3, outage_patience_s=30.0
        )
        rewards, said, counts = judge.judge_pools(of, seed=1)
    assert counts["outages"] >= 1 and counts["missing"] == 0
    assert said == expected[1]
    for a, b in zip(rewards, expected[0], strict=True):
        assert a.total.tobytes() == b.total.tobytes()
    assert "judge server j" in caplog.text and "asking again in" in caplog.text


def test_a_server_that_does_not_come_back_stops_the_call_by_its_name(
    folder: Path, tmp_path: Path
) -> None:
    begun = time.monotonic()
    with scripted_server(lambda path, body: (503, {}, "gone")) as url:
        judge = make_judge(
            url, folder, tmp_path, PAIRWISE, timeout_s=0.3, outage_patience_s=2.0, concurrency=4
        )
        with pytest.raises(JudgeFailed, match=r"judge server j.*gone.*waited 2 s \(judge\.outage"):
            judge.judge_pools(pools(), seed=1)
    assert 2.0 <= time.monotonic() - begun < 15


def test_what_was_paid_before_an_outage_is_not_paid_again(folder: Path, tmp_path: Path) -> None:
    of, server = pools(3, 4), Server(folder)
    calls = [0]

    def answer(path: str, body: dict[str, Any]) -> Any:
        calls[0] += 1
        server.up = not 8 < calls[0] < 14
        return server(path, body)

    with scripted_server(answer) as url:
        judge = make_judge(
            url, folder, tmp_path, PAIRWISE,
            timeout_s=0.3, outage_patience_s=30.0, concurrency=2,
        )  # fmt: skip
        _, _, counts = judge.judge_pools(of, seed=1)
    assert counts["paid"] == counts["verdicts"] == 18 and counts["missing"] == 0


def test_another_model_after_an_outage_stops_at_once(folder: Path, tmp_path: Path) -> None:
    server = Server(folder)
    server.up = False
    with scripted_server(server, model="judge") as url, scripted_server(server, model="x") as other:
        judge = make_judge(url, folder, tmp_path, PAIRWISE, timeout_s=0.3, outage_patience_s=30.0)
        servers = judge._servers["j"].endpoint
        object.__setattr__(servers, "url", other)
        with pytest.raises(ValueError, match="serves x but recipe names judge"):
            judge.judge_pools(pools(), seed=1)


# Several servers


def test_all_questions_on_one_prefix_meet_the_same_server(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []

    def of(n: int) -> Any:
        server, tokenizer = Server(folder), JudgeTokenizer(folder)

        def answer(path: str, body: dict[str, Any]) -> Any:
            text = tokenizer._trusted.decode(body["prompt"])
            seen.append((n, text.split("\nP", 1)[1].split("\n", 1)[0]))
            return server(path, body)

        return answer

    with scripted_server(of(0)) as a, scripted_server(of(1)) as b:
        make_judge([a, b], folder, tmp_path, PAIRWISE).judge_pools(pools(16, 4), seed=1)
    homes: dict[str, set[int]] = {}
    for n, prefix in seen:
        homes.setdefault(prefix, set()).add(n)
    assert len(homes) == 16 and all(len(found) == 1 for found in homes.values())
    assert {n for n, _ in seen} == {0, 1}


def test_another_server_answers_for_one_that_is_gone(folder: Path, tmp_path: Path) -> None:
    of = pools(6, 4)
    with scripted_server(Server(folder)) as url:
        expected = make_judge(url, folder, tmp_path / "a", PAIRWISE).judge_pools(of, seed=1)
        urls = ["http://127.0.0.1:9", url]
        judge = make_judge(urls, folder, tmp_path / "b", PAIRWISE, timeout_s=0.3)
        _, said, counts = judge.judge_pools(of, seed=1)
    assert said == expected[1] and counts["missing"] == 0 and counts["outages"] == 0


def test_servers_of_one_criterion_must_serve_one_model(folder: Path, tmp_path: Path) -> None:
    both = PAIRWISE.model_copy(update={"server": ("j", "k")})
    servers = {"j": served("http://h:1", folder), "k": served("http://h:2", folder, model="other")}
    with pytest.raises(ValueError, match="must serve one model, but serve j: judge, k: other"):
        Judge(
            (both,), servers=servers, cache=Cache(tmp_path),
            settings=Settings(criteria=(both,), cache_dir=tmp_path),
            prefix_text=lambda sample, num: "", suffix_text=lambda sample: "",
        )  # fmt: skip


def test_failures_of_requests_are_no_outage_while_they_are_few(
    folder: Path, tmp_path: Path
) -> None:
    """One pool of which every question is too long: 28 in a row, of 588."""

    def answer(path: str, body: dict[str, Any]) -> Any:
        text = JudgeTokenizer(folder)._trusted.decode(body["prompt"])
        return (400, {}, "too long") if "\nP0\n" in text else server(path, body)

    server = Server(folder)
    with scripted_server(answer) as url:
        judge = make_judge(url, folder, tmp_path, PAIRWISE, concurrency=4)
        rewards, _, counts = judge.judge_pools(pools(21, 8), seed=1)
    assert counts["missing"] == 28 and counts["outages"] == 0
    assert not rewards[0].valid.any() and all(r.valid.all() for r in rewards[1:])


def test_each_outage_of_a_long_call_has_the_whole_patience(folder: Path, tmp_path: Path) -> None:
    """Two rounds of a bracket, each with an outage of most of the patience."""
    server, down = Server(folder), {"until": time.monotonic() + 1.5, "again": True}

    def answer(path: str, body: dict[str, Any]) -> Any:
        if time.monotonic() < down["until"]:
            return (503, {}, "away")
        if down["again"] and len(server.tries) >= 2 * 4:  # the first round is done
            down["again"], down["until"] = False, time.monotonic() + 1.5
            return (503, {}, "away")
        return server(path, body)

    with scripted_server(answer) as url:
        judge = make_judge(
            url, folder, tmp_path, PAIRWISE, timeout_s=0.3, outage_patience_s=2.5,
            schedule=Bracket(name="bracket"),
        )  # fmt: skip
        _, _, counts = judge.judge_pools(pools(2, 8), seed=1)
    assert counts["missing"] == 0 and counts["outages"] >= 2


def test_the_nonce_of_a_prompt_without_prefix_is_the_same_in_every_process() -> None:
    code = (
        "from megatron_sip.judge.criteria import Subject, fields_of\n"
        "from megatron_sip.judge.prompts import load_prompt\n"
        "from megatron_sip.types import Question\n"
        "prompt = load_prompt('quality_pairwise_v2')\n"
        "for first in (True, False):\n"
        "    question = Question('q', 0, 1, 0, first)\n"
        "    print(fields_of(Subject('', ' a', ' b'), question, prompt)['nonce'])\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    (both,) = said
    assert len(set(both.split())) == 1
