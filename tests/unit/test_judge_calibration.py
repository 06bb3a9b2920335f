"""Labelled pairs: what is read, what is refused by file and line, what is counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pool_helpers import rewards

from megatron_sip.config_judge import LikelihoodCriterion, PairwiseCriterion
from megatron_sip.judge.calibration import (
    LabelledPair,
    accuracies,
    check_suffixes,
    pools_of,
    prefix_text_of,
    read_pairs,
)
from megatron_sip.types import Verdict

FIT = LikelihoodCriterion(form="likelihood", name="fit", server="j")
QUALITY = PairwiseCriterion(
    form="pairwise", name="quality", server="j", prompt="quality_pairwise_v1"
)
GOOD = {"prefix": "Once", "a": " upon a time", "b": " xq", "better": "a"}


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_pairs_are_read_in_order_with_their_lines(tmp_path: Path) -> None:
    odd = GOOD | {"better": "tie", "suffix": " \U0001f600", "annotator": 7}
    path = write(tmp_path / "p.jsonl", "\ufeff" + json.dumps(GOOD), "", json.dumps(odd), "")
    assert read_pairs(path) == (
        LabelledPair("Once", " upon a time", " xq", "a", None, 1),
        LabelledPair("Once", " upon a time", " xq", "tie", " \U0001f600", 3),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('["prefix"]', "not a JSON object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "b"}), '"b" is missing'),
        (json.dumps(GOOD | {"a": 3}), '"a" is 3; it must be a text'),
        (json.dumps(GOOD | {"suffix": []}), r'"suffix" is \[\]'),
        (json.dumps(GOOD | {"better": "A"}), '"better" is "A"; it must be "a", "b" or "tie"'),
        (json.dumps(GOOD | {"better": ["a"]}), r'"better" is \["a"\]'),
        (json.dumps({k: v for k, v in GOOD.items() if k != "better"}), '"better" is missing'),
        (json.dumps(GOOD | {"b": GOOD["a"]}), "the same text"),
        (json.dumps(GOOD | {"b": "\ud800"}), "surrogate"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps(GOOD), line)
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 2: .*{said}"):
        read_pairs(path)


def test_bytes_that_are_no_text_and_files_without_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'{"prefix": "\xff"}')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: not a JSON object"):
        read_pairs(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"e\.jsonl holds no pair"):
        read_pairs(write(tmp_path / "e.jsonl", "", "  "))
    with pytest.raises(ValueError, match=r"n\.jsonl cannot be read"):
        read_pairs(tmp_path / "n.jsonl")


def test_a_prompt_that_shows_the_suffix_needs_one_in_each_pair() -> None:
    pair = LabelledPair("p", "a", "b", "a", suffix="s", line=4)
    check_suffixes([pair], Path("p.jsonl"))
    with pytest.raises(ValueError, match=r'p\.jsonl, line 9: "suffix" is missing'):
        check_suffixes([pair, replace(pair, suffix=None, line=9)], Path("p.jsonl"))


class Bytes:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_pools_hold_a_and_b_and_the_prefix_is_cut_from_its_beginning() -> None:
    pairs = [LabelledPair("abcdef", " a", " bb", "b"), LabelledPair("x", " c", " d", "a")]
    tokenizer = Bytes()
    pools = pools_of(pairs, tokenizer)  # type: ignore[arg-type]
    assert [[c.text for c in pool.candidates] for pool in pools] == [[" a", " bb"], [" c", " d"]]
    np.testing.assert_array_equal(pools[0].candidates[1].token_ids, [32, 98, 98])
    text = prefix_text_of(pairs, tokenizer)  # type: ignore[arg-type]
    assert text(pools[0].sample, 2) == "ef" and text(pools[0].sample, 99) == "abcdef"
    assert text(pools[1].sample, 1) == "x"
    assert not len(pools_of(pairs, None)[0].candidates[0].token_ids)


def asked(score_of_a: float, *, a_first: bool, turned: bool = False) -> Verdict:
    """What one order says of a; `turned` asks about b in the same order."""
    if turned:
        return Verdict("quality", 1, 0, 0, 1 - score_of_a, "", not a_first)
    return Verdict("quality", 0, 1, 0, score_of_a, "", a_first)


@pytest.mark.parametrize("turned", [False, True])
def test_accuracy_and_consistency_counted_by_hand(turned: bool) -> None:
    # by pair: label, P(a) when a stands first, P(a) when b stands first
    table = [
        ("a", 0.9, 0.8),  # right, in both orders
        ("a", 0.9, 0.2),  # the first one is preferred
        ("b", 0.6, 0.1),  # the first one is preferred
        ("b", 0.7, 0.9),  # wrong, in both orders
        ("tie", 0.9, 0.9),  # no right answer; consistent
    ]
    pairs = [LabelledPair(f"p{i}", "a", "b", row[0]) for i, row in enumerate(table)]  # type: ignore[arg-type]
    verdicts = [
        (asked(x, a_first=True, turned=turned), asked(y, a_first=False, turned=turned))
        for _, x, y in table
    ]
    scores = [[1, 0], [0.5, 0.5], [0.5, 0.5], [1, 0], [1, 0]]  # where orders disagree: a tie
    found = [
        replace(
            rewards(s),
            by_criterion={
                "quality": np.array(s, np.float32),
                "fit": np.array([-2, -1], np.float32),
            },
        )
        for s in scores
    ]
    rows = accuracies(pairs, found, verdicts, criteria=[QUALITY, FIT], resamples=99, seed=1)
    quality, fit, total = rows
    assert [row.name for row in rows] == ["quality", "fit", "total"]
    assert quality.accuracy == total.accuracy == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert (quality.pairs, quality.missing) == (4, 0)
    assert quality.better_first == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert quality.better_second == pytest.approx((1 + 0 + 0 + 0) / 4)
    assert quality.consistent == pytest.approx(3 / 5)
    assert quality.low is not None and quality.high is not None
    assert quality.low < 0.5 < quality.high
    assert fit.accuracy == pytest.approx(2 / 4)  # it prefers b
    assert fit.better_first is None and fit.consistent is None and fit.consistent_low is None


def test_a_missing_verdict_is_counted_and_no_answer() -> None:
    pairs = [LabelledPair("p", "a", "b", "a"), LabelledPair("q", "a", "b", "a")]
    verdicts = [(asked(0.9, a_first=True), replace(asked(0.9, a_first=False), score=None)), ()]
    found = [
        replace(rewards(s), by_criterion={"quality": np.array(s, np.float32)})
        for s in ([1, 0], [math.nan, math.nan])
    ]
    quality, total = accuracies(
        pairs, found, verdicts, criteria=[QUALITY], resamples=99, seed=1
    )  # fmt: skip
    assert (quality.accuracy, quality.pairs, quality.missing) == (1.0, 1, 1)
    assert (total.accuracy, total.pairs, total.missing) == (1.0, 1, 1)
    assert quality.low is None  # one prefix has no spread
    assert quality.better_first == 1.0 and quality.better_second is None
    assert quality.consistent is None


def test_a_gate_decides_the_total() -> None:
    pair = LabelledPair("p", "a", "b", "b")
    found = replace(
        rewards([2.0, 1.0], passes=[False, True]),
        by_criterion={"fit": np.array([2, 1], np.float32)},
    )
    fit, total = accuracies([pair], [found], [()], criteria=[FIT], resamples=9, seed=1)
    assert (fit.accuracy, total.accuracy) == (0.0, 1.0)
