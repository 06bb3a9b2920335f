"""Evaluation statistics: hand-computed values, invariants, and intervals that cover the truth."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.evaluation.statistics import (
    bootstrap_interval,
    distinct_n,
    distinct_n_by_sets,
    mean_length,
    wins,
)

SCORES = st.floats(-1e6, 1e6)
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=50)
TOKENS = st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=8)


def test_win_rate_counts_ties_half() -> None:
    assert wins([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]).mean() == 2.5 / 4
    assert wins([1.0, 2.0, 0.0], [0.0, 2.0, 4.0]).tolist() == [1.0, 0.5, 0.0]


@given(PAIRS)
def test_win_rates_of_both_sides_sum_to_one(pairs: list[tuple[float, float]]) -> None:
    left, right = zip(*pairs, strict=True)
    assert (wins(left, right) + wins(right, left)).mean() == pytest.approx(1.0)
    assert (wins(left, left) == 0.5).all()


def test_win_rate_refuses_nan_unequal_lengths_and_nothing() -> None:
    with pytest.raises(ValueError, match="baseline_scores holds 1 NaN; drop"):
        wins([1.0, 2.0], [0.0, float("nan")])
    with pytest.raises(ValueError, match="2 prefixes, baseline_scores 1"):
        wins([1.0, 2.0], [0.0])
    with pytest.raises(ValueError, match=r"candidate_scores has shape \(0,\)"):
        wins([], [])


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert bootstrap_interval([0.25] * 10, resamples=50, seed=1) == (0.25, 0.25)


def test_bootstrap_of_two_values_is_known() -> None:
    # Means 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], resamples=1000, seed=1) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], resamples=1000, seed=1, level=0.4) == (0.5, 0.5)


def test_bootstrap_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(values, resamples=2000, seed=1)
    expected = 2 * 1.96 * values.std() / 20
    assert high - low == pytest.approx(expected, rel=0.08)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=expected / 20)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    values = np.arange(20.0)
    first = bootstrap_interval(values, resamples=100, seed=5)
    assert first == bootstrap_interval(values, resamples=100, seed=5)
    assert first != bootstrap_interval(values, resamples=100, seed=6)


def test_groups_of_one_change_nothing_and_names_do_not_matter() -> None:
    values = np.arange(12.0)
    plain = bootstrap_interval(values, resamples=100, seed=5)
    assert bootstrap_interval(values, groups=range(12), resamples=100, seed=5) == plain
    named = [f"document {i}" for i in range(12)]
    assert bootstrap_interval(values, groups=named, resamples=100, seed=5) == plain


def test_whole_documents_are_resampled() -> None:
    # Two documents of 1 and 3 prefixes: only these means can occur.
    low, high = bootstrap_interval(
        [0.0, 1.0, 1.0, 1.0], groups=[7, 9, 9, 9], resamples=500, seed=1, level=0.4
    )
    assert (low, high) == (0.75, 0.75)


@pytest.mark.parametrize(("grouped", "at_least", "at_most"), [(True, 0.85, 1.0), (False, 0, 0.7)])
def test_interval_covers_the_truth_only_if_documents_stay_whole(
    grouped: bool, at_least: float, at_most: float
) -> None:
    generator = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 8)
    covered = 0
    for trial in range(100):
        values = generator.normal(size=30)[groups] + 0.1 * generator.normal(size=240)
        low, high = bootstrap_interval(
            values, groups=groups.tolist() if grouped else None, resamples=200, seed=trial
        )
        covered += low <= 0.0 <= high
    assert at_least <= covered / 100 <= at_most


@settings(max_examples=50)
@given(st.lists(SCORES, min_size=2, max_size=20), st.integers(0, 2**32))
def test_interval_is_ordered_and_inside_the_range(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, resamples=20, seed=seed)
    slack = 1e-9 * (1 + max(abs(v) for v in values))
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_bootstrap_refuses_what_has_no_interval() -> None:
    with pytest.raises(ValueError, match="values holds 1 NaN"):
        bootstrap_interval([0.0, float("nan")], resamples=10, seed=1)
    with pytest.raises(ValueError, match="1 document"):
        bootstrap_interval([0.0, 1.0], groups=[4, 4], resamples=10, seed=1)
    with pytest.raises(ValueError, match="groups has length 1, values 2"):
        bootstrap_interval([0.0, 1.0], groups=[4], resamples=10, seed=1)
    with pytest.raises(ValueError, match="resamples is 0"):
        bootstrap_interval([0.0, 1.0], resamples=0, seed=1)


def test_distinct_n_by_hand() -> None:
    lists = [[1, 2, 1, 2], np.array([2, 1], np.int32)]
    assert distinct_n(lists, 1) == 2 / 6
    assert distinct_n(lists, 2) == 2 / 4  # (1,2) (2,1) (1,2) | (2,1)
    assert distinct_n(lists, 4) == 1.0


def test_n_grams_never_cross_candidates() -> None:
    assert distinct_n([[1, 2], [3, 4]], 2) == 1.0
    with pytest.raises(ValueError, match="none of 2 candidates has n = 3 tokens"):
        distinct_n([[1, 2], [3, 4]], 3)
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([[1]], 0)


@given(TOKENS.filter(lambda lists: any(lists)), st.randoms())
def test_distinct_n_ignores_order_and_falls_when_all_is_repeated(
    lists: list[list[int]], random: Random
) -> None:
    value = distinct_n(lists, 1)
    assert 0 < value <= 1
    assert distinct_n(lists + lists, 1) == pytest.approx(value / 2)
    random.shuffle(lists)
    assert distinct_n(lists, 1) == value


def test_mean_length_counts_tokens() -> None:
    assert mean_length([[1, 2, 3], np.zeros(0, np.int32), [4]]) == 4 / 3
    with pytest.raises(ValueError, match="token_lists is empty"):
        mean_length([])


def test_distinct_by_sets_does_not_depend_on_how_many_equal_sets_there_are():
    one = [[1, 2, 3], [1, 2, 4]]
    assert distinct_n_by_sets(one, 2, set_size=2) == distinct_n(one, 2) == 0.75
    assert distinct_n_by_sets(one * 3, 2, set_size=2) == 0.75
    assert distinct_n(one * 3, 2) == 0.25
    assert distinct_n_by_sets([*one, [9, 9, 9]], 2, set_size=2) == 0.75  # incomplete last set
    assert distinct_n_by_sets(one, 2, set_size=100) == 0.75
