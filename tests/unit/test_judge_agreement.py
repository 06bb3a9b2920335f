"""Agreement of two judges, against scipy, naive code and numbers counted by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from pool_helpers import rewards

from megatron_sip.judge.agreement import (
    MEASURES,
    agreement,
    kendall,
    live_pairs,
    spearman,
    standing,
    summarize,
)
from megatron_sip.types import Pick

NAN = math.nan


def naive_kendall(a: list[float], b: list[float]) -> float:
    """Tau-b counted pair by pair from its definition."""
    concordant = discordant = only_a = only_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        x, y = a[i] - a[j], b[i] - b[j]
        if x * y > 0:
            concordant += 1
        elif x * y < 0:
            discordant += 1
        elif x == 0 and y != 0:
            only_a += 1
        elif y == 0 and x != 0:
            only_b += 1
    untied = concordant + discordant
    return (concordant - discordant) / math.sqrt((untied + only_a) * (untied + only_b))


@pytest.mark.parametrize("levels", [2, 3, 5, 1000])
def test_rank_correlations_are_scipys_with_and_without_ties(levels: int) -> None:
    generator = np.random.default_rng(levels)
    compared = 0
    for size in range(2, 18):
        a, b = generator.integers(levels, size=(2, size)).astype(float)
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert math.isnan(spearman(a, b)) and math.isnan(kendall(a, b))
            continue
        compared += 1
        rho, tau = scipy.stats.spearmanr(a, b), scipy.stats.kendalltau(a, b)
        assert spearman(a, b) == pytest.approx(rho[0], abs=1e-12)
        assert kendall(a, b) == pytest.approx(tau[0], abs=1e-12)
        assert kendall(a, b) == pytest.approx(naive_kendall(list(a), list(b)), abs=1e-12)
    assert compared > 8


def test_one_pool_counted_by_hand() -> None:
    ledger = np.array([0.9, 0.9, 0.5, 0.1, NAN])
    other = np.array([0.2, 0.8, 0.8, 0.1, 0.3])
    found = agreement(ledger, other, pairs=[(0, 3), (1, 2), (2, 0), (1, 4)])
    assert found.compared == 4
    # best: {0, 1} and {1, 2} have one of three in common; worst: {3} and {3}
    assert found.values["same_best"] == pytest.approx(1 / 3)
    assert found.values["same_worst"] == 1.0
    # (0, 3) kept, (1, 2) a tie, (2, 0) kept by the other judge, (1, 4) has no ledger reward
    assert found.values["pair_order"] == pytest.approx((1 + 0.5 + 1) / 3)
    # pairs 01 02 03 12 13 23: signs of the ledger 0 + + + + +, of the other - - + 0 + +
    assert found.values["kendall"] == pytest.approx((3 - 1) / math.sqrt(5 * 5))
    assert found.chance["same_worst"] == pytest.approx(1 / 4)
    # two of four at random: the same two in 1 of 6, one in common in 4 of 6, none in 1 of 6
    assert found.chance["same_best"] == pytest.approx((1 + 4 / 3) / 6)


@pytest.mark.parametrize("a", [[3, 1, 4, 2, 5], [1, 1, 0, 2, 2], [1, 0, 0, 0, 0]])
@pytest.mark.parametrize("b", [[1, 2, 3, 4, 5], [2, 1, 1, 2, 1], [0, 0, 3, 3, 3]])
def test_chance_is_the_mean_over_all_orders(a: list[float], b: list[float]) -> None:
    orders = [
        agreement(np.array(a), np.array(order), pairs=[(0, 1), (3, 2)])
        for order in itertools.permutations(b)
    ]
    for name in MEASURES:
        mean = np.mean([found.values[name] for found in orders])
        assert mean == pytest.approx(orders[0].chance[name], abs=1e-12), name


def test_itself_is_one_and_its_inverse_is_zero_or_minus_one() -> None:
    a = np.array([0.3, -2.0, 7.0, 1.5])
    same, inverse = agreement(a, a, pairs=[(2, 1)]), agreement(a, -a, pairs=[(2, 1)])
    assert [same.values[name] for name in MEASURES] == pytest.approx([1, 1, 1, 1, 1])
    assert [inverse.values[name] for name in MEASURES] == pytest.approx([0, 0, -1, -1, 0])


def test_places_are_all_that_counts() -> None:
    generator = np.random.default_rng(5)
    a, b = generator.normal(size=(2, 9))
    before = agreement(a, b, pairs=[(0, 1)])
    assert agreement(np.exp(a), 3 * b**3, pairs=[(0, 1)]) == before


def test_a_gate_puts_a_candidate_below_all_that_pass() -> None:
    found = rewards([3.0, 1.0, 2.0, 2.0, NAN], passes=[False, True, True, True, False])
    np.testing.assert_array_equal(standing(found), [0, 1, 2, 2, NAN])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, NAN], [NAN, NAN]])
def test_fewer_than_two_candidates_are_no_comparison(values: list[float]) -> None:
    found = agreement(np.array(values), np.array(values), pairs=[])
    assert all(math.isnan(found.values[name]) for name in MEASURES)


def test_rewards_of_two_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="not of one pool"):
        agreement(np.zeros(3), np.zeros(4), pairs=[])


def test_live_pairs_leave_dead_ones_and_other_roles_out() -> None:
    picks = [
        Pick(4, "chosen", 0.0, 1.0), Pick(1, "rejected", 0.0, 1.0),
        Pick(0, "chosen", 0.0, 0.0), Pick(0, "rejected", 0.0, 0.0),
        Pick(3, "chosen", 0.0, 1.0), Pick(2, "rejected", 0.0, 1.0), Pick(-1, "prefix", 0.0, 1.0),
    ]  # fmt: skip
    assert live_pairs(picks) == ((4, 1), (3, 2))
    assert live_pairs([Pick(0, "sample", 0.7, 1.0)]) == ()
    assert live_pairs([Pick(0, "chosen", 0.0, 1.0)]) == ()


def test_summary_has_means_over_pools_that_define_a_measure_and_intervals_round_them() -> None:
    generator = np.random.default_rng(1)
    pools = [agreement(*generator.normal(size=(2, 4)), pairs=[(0, 1)]) for _ in range(200)]
    pools.append(agreement(np.array([1.0, NAN]), np.array([1.0, 2.0]), pairs=[]))
    found = {s.measure: s for s in summarize(pools, documents=range(201), resamples=300, seed=1)}
    assert list(found) == list(MEASURES)
    for name, chance in zip(MEASURES, [0.25, 0.25, 0, 0, 0.5], strict=True):
        row = found[name]
        values = [pool.values[name] for pool in pools[:200]]
        assert row.pools == 200 and row.chance == pytest.approx(chance)
        assert row.mean == pytest.approx(np.mean(values))
        assert row.low is not None and row.high is not None and row.mean is not None
        error = np.std(values) / math.sqrt(200)
        assert row.low < row.mean < row.high
        assert abs(row.mean - chance) < 4 * error  # the orders are random
        assert row.high - row.low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_pools_of_one_document_are_one_draw() -> None:
    generator = np.random.default_rng(2)
    pools = [agreement(*generator.normal(size=(2, 4)), pairs=[]) for _ in range(20)]
    repeated = [pool for pool in pools for _ in range(10)]
    documents = [i for i in range(20) for _ in range(10)]
    once = summarize(pools, documents=range(20), resamples=200, seed=1)
    again = summarize(repeated, documents=documents, resamples=200, seed=1)
    for a, b in zip(once[:4], again[:4], strict=True):
        assert (a.mean, a.low, a.high) == pytest.approx((b.mean, b.low, b.high)), a.measure
    alone = summarize(repeated, documents=[0] * 200, resamples=200, seed=1)
    assert alone[0].mean == pytest.approx(once[0].mean) and alone[0].low is None
    assert summarize([], documents=[], resamples=200, seed=1)[0].mean is None
