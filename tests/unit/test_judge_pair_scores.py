"""The table against a plain loop, Bradley-Terry against an optimiser of scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize

from megatron_sip.config_judge import Adaptive, AllPairs, Bracket, Pivot, RandomPairs
from megatron_sip.judge.pair_scores import (
    bradley_terry,
    order_consistency,
    pair_scores,
    pair_table,
    precision,
)
from megatron_sip.types import Verdict

MEANS = (AllPairs(name="all_pairs"), RandomPairs(name="random_pairs"), Pivot(name="pivot"))
STRENGTHS = (Bracket(name="bracket"), Adaptive(name="adaptive"))
SCORES = st.sampled_from([None, math.nan, 0.0, 0.2, 0.5, 0.7, 1.0])


def verdict(candidate, opponent, score, *, vote=0, first=True):
    return Verdict("q", candidate, opponent, vote, score, "", first)


def table_of(num, entries):
    table = np.full((num, num), np.nan)
    for (i, j), p in entries.items():
        table[i, j], table[j, i] = p, 1 - p
    return table


@st.composite
def tables(draw, low=2, high=9):
    num = draw(st.integers(low, high))
    chance = draw(hnp.arrays(float, (num, num), elements=st.floats(0, 1)))
    judged = draw(hnp.arrays(bool, (num, num)))
    pairs = [(i, j) for i in range(num) for j in range(i) if judged[i, j]]
    return table_of(num, {pair: float(chance[pair]) for pair in pairs})


@st.composite
def verdict_lists(draw):
    num = draw(st.integers(2, 5))
    places = [(i, j, v, f) for i in range(num) for j in range(i) for v in (0, 1) for f in (0, 1)]
    chosen = draw(st.lists(st.sampled_from(places), unique=True))
    found = []
    for i, j, vote, first in chosen:
        swap = draw(st.booleans())
        a, b, shown = (j, i, not first) if swap else (i, j, bool(first))
        found.append(verdict(a, b, draw(SCORES), vote=vote, first=shown))
    return num, found


def plain_entry(verdicts, i, j):
    """P(i beats j): mean over the votes that have a score, each by the orders that have one."""
    of_votes = []
    for vote in sorted({v.vote for v in verdicts}):
        seen = []
        for v in verdicts:
            if v.vote == vote and v.score is not None and v.score == v.score:
                if (v.candidate, v.opponent) == (i, j):
                    seen.append(v.score)
                if (v.candidate, v.opponent) == (j, i):
                    seen.append(1 - v.score)
        if any(s > 0.5 for s in seen) and any(s < 0.5 for s in seen):
            of_votes.append(0.5)
        elif seen:
            of_votes.append(sum(seen) / len(seen))
    return sum(of_votes) / len(of_votes) if of_votes else math.nan


@given(verdict_lists())
def test_the_table_is_what_a_plain_loop_finds(case):
    num, verdicts = case
    table = pair_table(verdicts, num)
    assert table.shape == (num, num) and table.dtype == np.float64
    for i in range(num):
        for j in range(num):
            expected = plain_entry(verdicts, i, j) if i != j else math.nan
            np.testing.assert_allclose(table[i, j], expected, atol=1e-12)
    halves = table + table.T
    assert np.allclose(halves[~np.isnan(halves)], 1)


def test_orders_that_disagree_are_a_tie_and_a_missing_one_does_not_count():
    both = [verdict(0, 1, 0.9), verdict(0, 1, 0.4, first=False)]
    assert pair_table(both, 2)[0, 1] == 0.5
    assert pair_table([both[0], verdict(0, 1, 0.6, first=False)], 2)[0, 1] == 0.75
    assert pair_table([both[0], verdict(0, 1, None, first=False)], 2)[0, 1] == 0.9
    assert pair_table([both[0], verdict(0, 1, 0.4, vote=1)], 2)[0, 1] == pytest.approx(0.65)


def test_order_consistency_counts_votes_with_both_orders():
    verdicts = [
        verdict(0, 1, 0.9), verdict(0, 1, 0.4, first=False),  # disagree
        verdict(0, 2, 0.9), verdict(2, 0, 0.2, first=True),  # agree, the other way round
        verdict(1, 2, 0.5), verdict(1, 2, 0.1, first=False),  # a tie contradicts nobody
        verdict(1, 2, 0.5, vote=1), verdict(1, 2, None, vote=1, first=False),  # one is missing
        verdict(0, 3, 0.8), verdict(0, -1, 0.3),  # one order; not pairwise
    ]  # fmt: skip
    assert order_consistency(verdicts) == (2, 3)
    assert order_consistency([]) == (0, 0)


def optimised(table, ridge):
    """Maximum by BFGS on the log-likelihood written out pair by pair."""
    num = len(table)
    pairs = [(i, j) for i in range(num) for j in range(num) if not np.isnan(table[i, j])]

    def loss(theta):
        value = 0.5 * ridge * sum(t * t for t in theta)
        for i, j in pairs:
            value += table[i, j] * np.log1p(np.exp(-(theta[i] - theta[j])))
        return value

    def slope(theta):
        found = ridge * theta
        for i, j in pairs:
            lost = table[i, j] / (1 + np.exp(theta[i] - theta[j]))
            found[i] -= lost
            found[j] += lost
        return found

    return minimize(loss, np.zeros(num), jac=slope, method="BFGS", options={"gtol": 1e-10}).x


@settings(max_examples=60)
@given(tables(), st.sampled_from([0.05, 0.3, 2.0]))
def test_bradley_terry_is_the_maximum_that_an_optimiser_finds(table, ridge):
    theta = bradley_terry(table, ridge=ridge)
    np.testing.assert_allclose(theta, optimised(table, ridge), atol=1e-6)
    assert abs(theta.mean()) < 1e-12


def test_bradley_terry_of_two_solves_its_equation():
    """p - sigma(2 t) = ridge t for strengths t and -t."""
    theta = bradley_terry(table_of(2, {(0, 1): 1.0}), ridge=0.1)
    assert theta[0] == -theta[1]
    assert 1 - 1 / (1 + math.exp(-2 * theta[0])) == pytest.approx(0.1 * theta[0], abs=1e-10)


def test_bradley_terry_finds_the_strengths_behind_exact_probabilities():
    true = np.random.default_rng(3).normal(size=12)
    table = 1 / (1 + np.exp(true[None, :] - true[:, None]))
    np.fill_diagonal(table, np.nan)
    found = bradley_terry(table, ridge=1e-9)
    np.testing.assert_allclose(found, true - true.mean(), atol=1e-6)


def test_each_group_of_candidates_has_mean_zero_and_a_lonely_one_is_zero():
    theta = bradley_terry(table_of(6, {(0, 1): 0.9, (1, 2): 1.0, (3, 4): 0.2}))
    assert abs(theta[:3].sum()) < 1e-9 and abs(theta[3:5].sum()) < 1e-9 and abs(theta[5]) < 1e-12
    assert theta[0] > theta[1] > theta[2] and theta[4] > theta[3]


def test_a_ridge_that_is_not_positive_is_an_error_and_no_pool_is_none():
    with pytest.raises(ValueError, match="ridge"):
        bradley_terry(table_of(2, {(0, 1): 1.0}), ridge=0)
    assert bradley_terry(np.zeros((0, 0))).shape == (0,)


@given(tables(), st.data())
def test_precision_is_the_slope_of_the_slope(table, data):
    num = len(table)
    theta = np.array(data.draw(st.lists(st.floats(-2, 2), min_size=num, max_size=num)))

    def slope(at):
        chance = 1 / (1 + np.exp(at[None, :] - at[:, None]))
        return 0.3 * at + np.nansum(chance - table, axis=1)

    step = 1e-5
    columns = [
        (slope(theta + step * e) - slope(theta - step * e)) / (2 * step) for e in np.eye(num)
    ]
    np.testing.assert_allclose(precision(theta, table, ridge=0.3), np.array(columns), atol=1e-8)


@given(tables())
def test_scores_are_in_range_and_nan_exactly_without_a_verdict(table):
    judged = ~np.isnan(table).all(axis=1)
    for schedule in (*MEANS, *STRENGTHS):
        scores = pair_scores(schedule, table)
        assert (np.isnan(scores) == ~judged).all()
        assert ((scores[judged] >= 0) & (scores[judged] <= 1)).all()
        if schedule in STRENGTHS:
            assert scores[judged].sum() == pytest.approx(judged.sum() / 2)


@given(tables())
def test_mean_scores_are_the_mean_over_judged_pairs(table):
    for schedule in MEANS:
        for i, score in enumerate(pair_scores(schedule, table)):
            seen = [p for p in table[i] if p == p]
            assert score == pytest.approx(sum(seen) / len(seen)) if seen else np.isnan(score)


@given(st.integers(2, 12), st.integers(0, 2**31))
def test_scores_of_all_pairs_sum_to_half_the_pool(num, seed):
    chance = np.random.default_rng(seed).random((num, num))
    table = table_of(num, {(i, j): chance[i, j] for i in range(num) for j in range(i)})
    assert pair_scores(MEANS[0], table).sum() == pytest.approx(num / 2)


def test_strength_scores_are_the_expected_win_rate():
    table = table_of(3, {(0, 1): 0.8, (1, 2): 0.6})
    theta = bradley_terry(table)
    scores = pair_scores(STRENGTHS[1], table)
    for i in range(3):
        rates = [1 / (1 + math.exp(theta[j] - theta[i])) for j in range(3) if j != i]
        assert scores[i] == pytest.approx(sum(rates) / 2)


@given(tables(), st.randoms(use_true_random=False))
def test_scores_move_with_the_candidates(table, random):
    order = list(range(len(table)))
    random.shuffle(order)
    for schedule in (*MEANS, STRENGTHS[1]):  # a bracket breaks exact ties by place
        moved = pair_scores(schedule, table[np.ix_(order, order)])
        np.testing.assert_allclose(moved, pair_scores(schedule, table)[order], atol=1e-9)


def test_an_unbeaten_winner_comes_first_though_another_is_stronger():
    # 0 wins by a hair, 1 beats the rest by far
    table = table_of(4, {(0, 1): 0.51, (0, 2): 0.51, (1, 3): 0.99, (2, 3): 0.6})
    plain, dealt = (pair_scores(s, table) for s in reversed(STRENGTHS))
    assert plain.argmax() == 1 and dealt.argmax() == 0 and dealt.argmin() == 3
    assert dealt[0] == plain[1] and sorted(dealt) == sorted(plain)
    assert dealt[1] > dealt[2]
