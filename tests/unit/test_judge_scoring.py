import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.config_judge import (
    AllPairs,
    LikelihoodCriterion,
    PairwiseCriterion,
    PointwiseCriterion,
)
from megatron_sip.judge.scoring import finite_or_missing, normalized, score_pool
from megatron_sip.types import Verdict

PAIR = PairwiseCriterion(
    form="pairwise", name="q", server="j", prompt="quality_pairwise_v1", weight=2.0
)
ALL_PAIRS = AllPairs(name="all_pairs")
SINGLE = LikelihoodCriterion(form="likelihood", name="l", server="j", weight=0.5)


@st.composite
def pools(draw, missing=True):
    """(C, verdicts) of all pairs and all candidates."""
    num = draw(st.integers(2, 7))
    pair = st.floats(0, 1)
    single = st.floats(-10, 0)
    if missing:
        pair, single = st.none() | pair, st.none() | single
    verdicts = [
        Verdict("q", i, j, 0, draw(pair), "") for i in range(num) for j in range(i + 1, num)
    ]
    verdicts += [Verdict("l", i, -1, v, draw(single), "") for i in range(num) for v in range(2)]
    return num, verdicts


@settings(deadline=None)
@given(pools(missing=False))
def test_pairwise_scores_of_a_full_pool_sum_to_half_its_size(pool):
    num, verdicts = pool
    rewards = score_pool(verdicts, num, (PAIR,), ALL_PAIRS)
    assert rewards.by_criterion["q"].sum() == pytest.approx(num / 2, rel=1e-5)
    assert rewards.valid.all() and rewards.num_missing == 0


@settings(deadline=None)
@given(pools(), st.randoms())
def test_scores_permute_with_the_candidates(pool, random):
    num, verdicts = pool
    order = list(range(num))
    random.shuffle(order)
    moved = [
        Verdict(v.criterion, order[v.candidate], order[v.opponent] if v.opponent >= 0 else -1,
                v.vote, v.score, "")
        for v in verdicts
    ]  # fmt: skip
    random.shuffle(moved)
    before, after = (score_pool(x, num, (PAIR, SINGLE), ALL_PAIRS) for x in (verdicts, moved))
    np.testing.assert_allclose(after.total[order], before.total, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.valid[order], before.valid)
    assert after.num_missing == before.num_missing == sum(v.score is None for v in verdicts)


@settings(deadline=None)
@given(pools())
def test_who_is_named_first_in_a_verdict_does_not_matter(pool):
    num, verdicts = pool
    turned = [
        v if v.opponent < 0 or v.score is None
        else Verdict(v.criterion, v.opponent, v.candidate, v.vote, 1 - v.score, "")
        for v in verdicts
    ]  # fmt: skip
    first, second = (score_pool(x, num, (PAIR, SINGLE), ALL_PAIRS) for x in (verdicts, turned))
    np.testing.assert_allclose(first.total, second.total, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(pools())
def test_a_missing_verdict_never_enters_a_mean(pool):
    num, verdicts = pool
    rewards = score_pool(verdicts, num, (PAIR, SINGLE), ALL_PAIRS)
    for c in range(num):
        wins = [v.score for v in verdicts if v.criterion == "q" and v.candidate == c]
        wins += [
            None if v.score is None else 1 - v.score
            for v in verdicts
            if v.criterion == "q" and v.opponent == c
        ]
        votes = [v.score for v in verdicts if v.criterion == "l" and v.candidate == c]
        valid = True
        for name, scores in (("q", wins), ("l", votes)):
            there = [s for s in scores if s is not None]
            value = rewards.by_criterion[name][c]
            assert np.isnan(value) if not there else value == pytest.approx(np.mean(there), 1e-5)
            valid &= bool(there) and 2 * len(there) >= len(scores)
        assert rewards.valid[c] == valid
        assert np.isnan(rewards.total[c]) == (not valid)


def test_totals_are_weighted_sums_by_hand():
    verdicts = [
        Verdict("q", 0, 1, 0, 0.8, ""),
        Verdict("l", 0, -1, 0, -2.0, ""),
        Verdict("l", 1, -1, 0, -1.0, ""),
    ]
    rewards = score_pool(verdicts, 2, (PAIR, SINGLE), ALL_PAIRS)
    np.testing.assert_allclose(rewards.total, [2 * 0.8 - 1.0, 2 * 0.2 - 0.5], rtol=1e-6)
    assert rewards.total.dtype == np.float32


def test_ties_stay_ties():
    verdicts = [Verdict("l", i, -1, 0, -1.5, "") for i in range(3)]
    assert len(set(score_pool(verdicts, 3, (SINGLE,), ALL_PAIRS).total)) == 1


def test_a_pool_of_one_has_no_pairwise_score():
    rewards = score_pool([], 1, (PAIR,), ALL_PAIRS)
    assert not rewards.valid[0] and np.isnan(rewards.total[0])


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_a_missing_verdict(score):
    verdicts = [
        Verdict("q", 0, 1, 0, 0.75, ""), Verdict("q", 0, 2, 0, score, ""),
        Verdict("q", 1, 2, 0, 0.5, ""),
    ]  # fmt: skip
    rewards = score_pool(verdicts, 3, (PAIR,), ALL_PAIRS)
    np.testing.assert_allclose(rewards.by_criterion["q"], [0.75, (0.25 + 0.5) / 2, 0.5])
    assert rewards.num_missing == 1 and rewards.valid.all()
    alone = score_pool([Verdict("l", 0, -1, 0, score, "")], 1, (SINGLE,), ALL_PAIRS)
    assert not alone.valid[0] and np.isnan(alone.total[0]) and alone.num_missing == 1
    said = finite_or_missing(verdicts[1])
    assert said.score is None and said.reply == f"not usable: the score is {score}"
    assert finite_or_missing(verdicts[0]) is verdicts[0]


def test_a_total_that_float32_cannot_hold_is_no_reward():
    heavy = SINGLE.model_copy(update={"weight": 1e38})
    verdicts = [Verdict("l", i, -1, 0, s, "") for i, s in enumerate((-1.0, -9.0))]
    rewards = score_pool(verdicts, 2, (heavy,), ALL_PAIRS)
    assert rewards.valid.tolist() == [True, False]
    assert np.isfinite(rewards.total[0]) and np.isnan(rewards.total[1])


# Gates and scales

SAFE = PointwiseCriterion(
    form="pointwise", name="s", server="j", prompt="safety_pointwise_v2", weight=0.0, gate=0.6
)


def test_a_gate_looks_at_the_score_and_leaves_the_total_alone():
    verdicts = [Verdict("l", i, -1, 0, score, "") for i, score in enumerate([-1.0, -2.0, -3.0])]
    verdicts += [Verdict("s", i, -1, 0, score, "") for i, score in enumerate([0.59, 0.6, None])]
    rewards = score_pool(verdicts, 3, (SINGLE, SAFE), ALL_PAIRS)
    np.testing.assert_array_equal(rewards.passes, [False, True, False])
    np.testing.assert_array_equal(rewards.valid, [True, True, False])
    np.testing.assert_array_equal(rewards.total, np.float32([-0.5, -1.0, np.nan]))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [3.0, 1.0, 1.0, np.nan, 7.0]),
        ("rank", [2 / 3, 1 / 6, 1 / 6, np.nan, 1.0]),
        ("standard", [0.0, -2 / 6**0.5, -2 / 6**0.5, np.nan, 4 / 6**0.5]),
    ],
)
def test_scores_are_brought_to_a_scale_within_their_pool(scale, expected):
    scores = np.array([3.0, 1.0, 1.0, np.nan, 7.0])
    np.testing.assert_allclose(normalized(scores, scale), expected)
    alone = {"none": 5.0, "rank": 0.5, "standard": 0.0}
    assert normalized(np.array([5.0]), scale) == [alone[scale]]
    assert np.isnan(normalized(np.array([np.nan]), scale)).all()


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=9))
def test_ranks_are_the_mean_places_of_a_sorted_list(values):
    found = normalized(np.array(values, float), "rank")
    places = [
        np.mean([i for i, v in enumerate(sorted(values)) if v == x]) / (len(values) - 1)
        for x in values
    ]
    np.testing.assert_allclose(found, places)


def test_the_scale_is_applied_before_the_weight_and_after_the_gate():
    ranked = SINGLE.model_copy(update={"normalize": "rank", "gate": -2.5})
    verdicts = [Verdict("l", i, -1, 0, score, "") for i, score in enumerate([-1.0, -2.0, -3.0])]
    rewards = score_pool(verdicts, 3, (ranked,), ALL_PAIRS)
    np.testing.assert_array_equal(rewards.total, [0.5, 0.25, 0.0])
    np.testing.assert_array_equal(rewards.passes, [True, True, False])
    np.testing.assert_array_equal(rewards.by_criterion["l"], [-1, -2, -3])
