"""Planted near duplicates are found, and the rest stays."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_helpers import SPEECHES, batch_at, batch_of_texts

from megatron_sip.data.selection.near_duplicates import (
    MAX_MISS,
    NearDuplicates,
    bands_and_rows,
    shingle_hashes,
)
from megatron_sip.data.selection.words import ngrams, words_of


def kept_by(step: Any, texts: Sequence[str]) -> list[int]:
    found = step.objections(batch_of_texts(texts))
    return [i for i, objections in enumerate(found) if not objections]


def edited(text: str, *, every: int) -> str:
    """The text with each `every`-th word replaced by one that it has nowhere else."""
    words = text.split()
    return " ".join(f"qq{i}" if i % every == every - 1 else word for i, word in enumerate(words))


def jaccard(first: str, second: str) -> float:
    a, b = (set(ngrams(words_of(text), 5)) for text in (first, second))
    return len(a & b) / len(a | b)


def test_planted_near_duplicates_are_found_and_the_rest_stays() -> None:
    copies = [edited(SPEECHES[i], every=every) for i, every in [(0, 100), (3, 80), (7, 150)]]
    cousins = [edited(SPEECHES[i], every=15) for i in (1, 2)]
    assert min(jaccard(SPEECHES[i], c) for i, c in zip((0, 3, 7), copies, strict=True)) > 0.85
    assert max(jaccard(SPEECHES[i], c) for i, c in zip((1, 2), cousins, strict=True)) < 0.6
    texts = [*SPEECHES, *copies, *cousins, SPEECHES[5].upper() + "!"]
    step, n = NearDuplicates(seed=1), len(SPEECHES)
    found = step.objections(batch_of_texts(texts))
    left = {i: o[0] for i, o in enumerate(found) if o}
    assert sorted(left) == [n, n + 1, n + 2, n + 5]
    assert {o.rule for o in left.values()} == {"near_duplicate"}
    for i, original in [(n, 0), (n + 1, 3), (n + 2, 7), (n + 5, 5)]:
        told = re.fullmatch(r"resembles document (\d+), .* about ([\d.]+)", left[i].detail)
        assert told and int(told[1]) == original
        assert abs(float(told[2]) - jaccard(texts[original], texts[i])) < 0.15


def test_the_similarity_is_checked_against_the_threshold() -> None:
    texts = [SPEECHES[0], edited(SPEECHES[0], every=100)]
    exact = jaccard(*texts)
    assert 0.88 < exact < 0.93
    assert kept_by(NearDuplicates(seed=0, threshold=exact - 0.1), texts) == [0]
    assert kept_by(NearDuplicates(seed=0, threshold=0.99), texts) == [0, 1]
    assert kept_by(NearDuplicates(seed=0, threshold=1), [*texts, texts[1]]) == [0, 1]


def test_signatures_estimate_the_jaccard_similarity_without_bias() -> None:
    texts = [SPEECHES[4], edited(SPEECHES[4], every=50)]
    shares = []
    for seed in range(20):
        step = NearDuplicates(seed=seed)
        first, second = (step._signature(text).hashvalues for text in texts)
        shares.append(float((first == second).mean()))
    exact = jaccard(*texts)
    deviation = math.sqrt(exact * (1 - exact) / 128 / 20)
    assert abs(np.mean(shares) - exact) < 4 * deviation


def test_a_chain_of_copies_is_cut_where_it_has_moved_too_far() -> None:
    chain = [SPEECHES[0]]
    words = SPEECHES[0].split()
    for step in range(1, 5):  # each differs from the one before by 1/50 of its words
        words = [f"s{step}w{i}" if i % 50 == 5 * step else w for i, w in enumerate(words)]
        chain.append(" ".join(words))
    assert min(jaccard(a, b) for a, b in pairwise(chain)) > 0.8
    assert jaccard(chain[0], chain[2]) < 0.7
    assert kept_by(NearDuplicates(seed=2, threshold=0.75), chain) == [0, 2, 4]


def test_short_and_empty_texts_are_compared_whole() -> None:
    texts = ["one two", "one three", "One, two!", "", "...", "one two three four five six"]
    assert kept_by(NearDuplicates(seed=0), texts) == [0, 1, 3, 5]
    assert len(shingle_hashes("one two three four five six", n=5, seed=0)) == 2


def test_a_long_text_has_the_signature_of_all_its_shingles(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NearDuplicates(seed=0)._signature(SPEECHES[0]).hashvalues
    monkeypatch.setattr("megatron_sip.data.selection.near_duplicates._CHUNK", 7)
    assert (NearDuplicates(seed=0)._signature(SPEECHES[0]).hashvalues == whole).all()


@settings(max_examples=20)
@given(data=st.data())
def test_batches_and_the_order_inside_them_change_nothing(data: st.DataObject) -> None:
    pool = [f"the quick {a} fox jumps over {b} lazy dogs" for a in "abc" for b in "xyz"]
    texts = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=12))
    expected = sorted({text: i for i, text in reversed(list(enumerate(texts)))}.values())
    step = NearDuplicates(seed=data.draw(st.integers(0, 2**32 - 1)))
    kept, start = [], 0
    while start < len(texts):
        size = data.draw(st.integers(1, len(texts) - start))
        order = data.draw(st.permutations(range(start, start + size)))
        found = step.objections(batch_at(order, [texts[i] for i in order]))
        kept += [i for i, objections in zip(order, found, strict=True) if not objections]
        start += size
    assert sorted(kept) == expected


def test_more_documents_than_the_first_table_holds() -> None:
    texts = [f"a{i} b{i} c{i} d{i} e{i}" for i in range(1100)]
    step = NearDuplicates(seed=0, num_permutations=16)
    assert kept_by(step, [*texts, texts[0], texts[1050]]) == list(range(1100))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_bands_rarely_overlook_a_pair_at_the_threshold_and_no_larger_band_would(
    threshold: float,
) -> None:
    bands, rows = bands_and_rows(threshold, num_permutations=128)
    assert bands >= 2 and bands * rows <= 128
    assert (1 - threshold**rows) ** bands <= MAX_MISS
    if rows < 64:
        assert (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > MAX_MISS


def test_bands_at_eight_tenths_are_sixteen_of_eight() -> None:
    assert bands_and_rows(0.8, num_permutations=128) == (16, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1}, {"seed": 2**32}, {"threshold": 0.0}, {"threshold": 1.1},
        {"num_permutations": 1}, {"shingle_words": 0},
    ],
)  # fmt: skip
def test_wrong_settings_of_near_duplicates_are_told(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(ValueError, match=f"near_duplicates: {key} is .*; it must be"):
        NearDuplicates(**{"seed": 0, **wrong})


def test_a_step_that_was_used_before_is_refused() -> None:
    step = NearDuplicates(seed=0)
    step.objections(batch_of_texts(["a", "b"]))
    with pytest.raises(ValueError, match=r"document 0 came after 1; .* make a new one"):
        step.objections(batch_of_texts(["a"]))
