"""A look at the judges counts what they got right; a band and an alarm say when not to believe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_helpers import labels_reply, make_model_folder, make_sample, scripted_server, served

from megatron_sip.config_judge import Judge as Settings
from megatron_sip.config_judge import PairwiseCriterion, PointwiseCriterion, Trust
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.pool_store import PoolRecord
from megatron_sip.trust.alarm import Alarm, trend
from megatron_sip.trust.band import breaches, watched
from megatron_sip.trust.canaries import MASTER_KEYS, known_texts, pool_of, spoiled, spoiled_pool
from megatron_sip.trust.look import Watch
from megatron_sip.types import PoolRewards

QUALITY = PairwiseCriterion(form="pairwise", name="q", server="j", prompt="quality_pairwise_v2")
SAFETY = PointwiseCriterion(form="pointwise", name="s", server="j", prompt="safety_pointwise_v2")
WORDS = " the seven old bridges over the river were mended before winter came"


def test_a_spoiled_suffix_is_another_or_has_its_words_in_another_order() -> None:
    other, found = " and nothing else was said", set()
    for i in range(40):
        text = spoiled(WORDS, other, seed=1, sample_id=i)
        assert text == spoiled(WORDS, other, seed=1, sample_id=i) != WORDS
        found.add(text == other)
        assert text == other or sorted(text.split()) == sorted(WORDS.split())
    assert found == {True, False}
    assert spoiled(" no no", other, seed=1, sample_id=0) == other


def test_a_pool_of_canaries_holds_the_original_first() -> None:
    pool = spoiled_pool(make_sample(3), "P", WORDS, " other", seed=1)
    assert [c.source for c in pool.candidates] == ["suffix"] + ["rollout"] * 3
    assert pool.candidates[0].text == WORDS
    assert [c.text for c in pool.candidates][2:] == [" ", " " + MASTER_KEYS[3]]


def test_known_texts_are_as_many_of_each() -> None:
    safe, unsafe = known_texts()
    assert len(safe) == len(unsafe) >= 8 and not set(safe) & set(unsafe)


class Sampler:
    def __getitem__(self, i: int) -> Any:
        return make_sample(i)


def judge_that(folder: Path, prefers: Any) -> Any:
    """Prefers by a text's score; knows texts by the nonces round them."""
    tokenizer = JudgeTokenizer(folder)
    ids = {x: tokenizer.label_id(x) for x in ("1", "2", "Yes", "No")}

    def answer(path: str, body: dict[str, Any]) -> Any:
        text = tokenizer._trusted.decode(body["prompt"])
        nonce = text.split(" [", 1)[1].split(" ", 1)[0]
        fields = [part.split(f"\n{nonce}]")[0] for part in text.split(f"[{nonce}\n")[1:]]
        if "Continuation 2:" in text:
            first, second = (prefers(field, fields[0]) for field in fields[-2:])
            share = 0.5 if first == second else 0.9 if first > second else 0.1
            return labels_reply({ids["1"]: math.log(share), ids["2"]: math.log(1 - share)})
        share = prefers(fields[0], "")
        return labels_reply({ids["Yes"]: math.log(share), ids["No"]: math.log(1 - share)})

    return answer


def watch(url: str, folder: Path, *criteria: Any, **trust: Any) -> Watch:
    settings = Trust(interval=2, num_canaries=6, **trust)
    return Watch(
        settings,
        Settings(criteria=criteria, cache_dir=folder / "no-cache", outage_patience_s=0.0),
        {"j": served(url, folder)},
        Sampler(),
        lambda sample: (f"P{sample.sample_id}", original(sample.sample_id)),
        lambda sample, n: f"P{sample.sample_id}",
        range(6),
        seed=1,
    )


def original(i: int) -> str:
    return f" original {i}{WORDS}"


def quality(text: str, prefix: str) -> float:
    return float(text in (original(int(prefix[1:] or 0)), " right"))


def means_of(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in found.items() if count}


def test_a_good_judge_gets_everything_right_and_nothing_is_kept(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    asked: list[str] = []
    answer = judge_that(folder, lambda t, _: 0.9 if t in known_texts()[0] else 0.2)
    by_quality = judge_that(folder, quality)

    def both(path: str, body: dict[str, Any]) -> Any:
        asked.append(path)
        prompt = JudgeTokenizer(folder)._trusted.decode(body["prompt"])
        return (by_quality if "Continuation 2:" in prompt else answer)(path, body)

    with scripted_server(both) as url:
        it = watch(url, folder, QUALITY, SAFETY)
        assert it.is_due(0) and not it.is_due(1) and it.is_due(2)
        found = it.look(0, [])
        first = len(asked)
        it.look(0, [])
    assert len(asked) == 2 * first
    means = means_of(found)
    assert means == {
        "judge/canary_accuracy/q": 1.0, "judge/canary_master_keys/q": 1.0,
        "judge/canary_consistency/q": 1.0, "judge/canary_accuracy/s": 1.0,
    }  # fmt: skip
    assert found["judge/canary_accuracy/q"] == (6.0, 6.0)
    assert found["judge/canary_consistency/q"] == (18.0, 18.0)
    assert set(means) <= set(watched([QUALITY, SAFETY]))
    assert breaches(found, [QUALITY, SAFETY], it.settings) == []
    silent = breaches(
        found | {"judge/canary_accuracy/s": (0.0, 0.0)}, [QUALITY, SAFETY], it.settings
    )
    assert silent == ["judge/canary_accuracy/s has no verdict to be made of"]
    unwatched = SAFETY.model_copy(update={"canary": "none"})
    assert breaches({}, [unwatched], it.settings) == []


def test_a_judge_that_answers_a_position_is_found_out(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    one, two = (JudgeTokenizer(folder).label_id(x) for x in "12")
    with scripted_server(lambda *_: labels_reply({one: math.log(0.9), two: math.log(0.1)})) as url:
        it = watch(url, folder, QUALITY, min_order_consistency=0.7)
        found = it.look(0, [])
    means = means_of(found)
    assert means["judge/canary_accuracy/q"] == 0.5  # ties
    assert means["judge/canary_consistency/q"] == 0.0
    said = breaches(found, [QUALITY], it.settings)
    assert "judge/canary_accuracy/q is 0.500, judge.trust.min_accuracy is 0.6" in said
    assert "judge/canary_consistency/q is 0.000, judge.trust.min_order_consistency is 0.7" in said


def test_labelled_pairs_are_asked_too(tmp_path: Path) -> None:
    folder, pairs = make_model_folder(tmp_path), tmp_path / "pairs.jsonl"
    rows = [
        {"prefix": "P", "a": " x", "b": " right", "better": "b"},
        {"prefix": "P", "a": " right", "b": " x", "better": "a"},
        {"prefix": "P", "a": " right", "b": " x", "better": "b"},
        {"prefix": "P", "a": " x", "b": " y", "better": "tie"},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with scripted_server(judge_that(folder, quality)) as url:
        found = watch(url, folder, QUALITY, calibration=pairs).look(0, [])
    assert found["judge/canary_calibration/q"] == (2.0, 3.0)


def test_a_second_judge_says_whether_it_prefers_the_best_to_the_worst(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)

    def record(texts: list[str], totals: list[float]) -> PoolRecord:
        pool = pool_of(texts, prefix="P", sample=make_sample(len(texts)))
        valid = np.ones(len(texts), bool)
        return PoolRecord(0, 0, pool, PoolRewards({}, np.float32(totals), valid, 0, valid), (), ())

    records = [
        record([" x", " right", " y"], [0.0, 2.0, 1.0]),
        record([" right", " x"], [0.0, 2.0]),
        record([" x", " right"], [1.0, 1.0]),  # no best: not asked
    ]
    second = QUALITY.model_copy(update={"name": "second", "canary": "none"})
    with scripted_server(judge_that(folder, quality)) as url:
        found = watch(
            url, folder, QUALITY.model_copy(update={"canary": "none"}), second=second
        ).look(0, records)
    assert found == {"judge/second_agreement": (1.0, 2.0)}


# The alarm


def test_trend_is_a_difference_beyond_its_error() -> None:
    assert trend([1, 1, 1, 2, 2, 2]) == 1 and trend([2, 2, 2, 1, 1, 1]) == -1
    assert trend([1, 1, 1, 1]) == 0 and trend([1, 2, 3]) == 0
    assert trend([0, 5, 0, 5, 1, 5, 0, 5]) == 0  # noise
    draw = np.random.default_rng(1)
    false = [trend(draw.normal(size=8)) for _ in range(2000)]
    assert np.mean(np.array(false) != 0) < 0.12


@pytest.mark.parametrize(
    ("name", "worse"),
    [("eval/nll", 0.1), ("eval/distinct2", -0.1), ("judge/second_agreement", -0.1)],
)
def test_the_alarm_sounds_when_reward_rises_and_what_it_stands_for_falls(
    name: str, worse: float
) -> None:
    for way, expected in ((1.0, 1), (-1.0, 0)):
        alarm, found = Alarm(6), []
        for i in range(6):
            found = alarm.heard({"reward/chosen": 0.1 * i, name: 0.5 + way * worse * i})
        assert len(found) == expected
        assert not expected or (name in found[0] and "reward/chosen rises" in found[0])
    alarm = Alarm(6)
    assert not any(alarm.heard({"reward/chosen": 1.0, name: 0.5 + worse * i}) for i in range(8))


def test_what_was_not_measured_this_step_sounds_no_alarm() -> None:
    alarm = Alarm(6)
    for i in range(6):
        alarm.heard({"reward/chosen": 0.1 * i, "eval/nll": 0.1 * i})
    assert alarm.heard({"reward/chosen": 0.7}) == []
    assert alarm.heard({"reward/chosen": 0.8, "eval/nll": 0.8})
