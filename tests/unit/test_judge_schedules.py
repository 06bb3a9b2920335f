"""What each schedule asks: counts, balance, ends, and that it finds who it should."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.config_judge import (
    Adaptive,
    AllPairs,
    Bracket,
    LikelihoodCriterion,
    PairwiseCriterion,
    Pivot,
    PointwiseCriterion,
    RandomPairs,
    Reasoned,
)
from megatron_sip.judge.pair_scores import bradley_terry, pair_scores, pair_table, precision
from megatron_sip.judge.schedules import SCHEDULES, next_questions
from megatron_sip.judge.schedules.adaptive import expected_gaps
from megatron_sip.types import Verdict

PAIR = PairwiseCriterion(form="pairwise", name="q", server="j", prompt="quality_pairwise_v1")
OTHER = PAIR.model_copy(update={"name": "r"})
SINGLE = LikelihoodCriterion(form="likelihood", name="l", server="j")
THREE = Reasoned(kind="reasoned", votes=3)
ALL = AllPairs(name="all_pairs")
EACH = (
    ALL, RandomPairs(name="random_pairs"), RandomPairs(name="random_pairs", opponents=3),
    Pivot(name="pivot"), Bracket(name="bracket"), Adaptive(name="adaptive"),
    Adaptive(name="adaptive", budget=0.6),
)  # fmt: skip
sizes, seeds = st.integers(0, 20), st.integers(0, 2**31)
schedules, shares = st.sampled_from(EACH), st.sampled_from([0.0, 0.3, 1.0])
few_examples = settings(max_examples=60)


def ask(schedule, verdicts, num, seed, criteria=(PAIR,), **options):
    return next_questions(schedule, verdicts, num, seed, criteria=criteria, **options)


def answer(q, score=0.5):
    return Verdict(q.criterion, q.candidate, q.opponent, q.vote, score, "", q.candidate_first)


def play(schedule, num, seed, judge=lambda q: 0.5, rounds=30, **options):
    """All verdicts, and the number of rounds; fails if the schedule does not end."""
    verdicts = []
    for played in range(rounds):
        asked = ask(schedule, verdicts, num, seed, **options)
        if not asked:
            return verdicts, played
        verdicts += [answer(q, judge(q)) for q in asked]
    raise AssertionError(f"no end after {rounds} rounds")


def truth(strengths, scale=1.0):
    return lambda q: 1 / (1 + math.exp(scale * (strengths[q.opponent] - strengths[q.candidate])))


def random_judge(seed, missing=0.2):
    rng = np.random.default_rng(seed)
    return lambda q: None if rng.random() < missing else float(rng.choice([0.0, 0.3, 0.5, 1.0]))


def expected_pairs(schedule, num):
    pairs = num * (num - 1) // 2
    if num < 2:
        return 0
    if schedule.name == "random_pairs":
        return min(pairs, num * schedule.opponents // 2)
    if schedule.name == "adaptive":
        return min(pairs, max(math.ceil(1.5 * num), math.floor(schedule.budget * pairs)))
    counts = {"all_pairs": pairs, "pivot": num - 1, "bracket": -(-3 * num // 2) - 2}
    return counts[schedule.name]


def pairs_of(questions):
    return [tuple(sorted((q.candidate, q.opponent))) for q in questions]


def first_places(questions):
    return Counter(q.candidate if q.candidate_first else q.opponent for q in questions)


def test_there_is_a_schedule_for_each_section():
    assert set(SCHEDULES) == {schedule.name for schedule in EACH}


@settings(max_examples=150)
@given(schedules, sizes, seeds, st.integers(0, 9))
def test_each_schedule_asks_its_number_of_pairs_none_twice_whatever_is_missing(
    schedule, num, seed, judge_seed
):
    verdicts, _ = play(schedule, num, seed, random_judge(judge_seed))
    pairs = pairs_of(verdicts)
    assert len(pairs) == len(set(pairs)) == expected_pairs(schedule, num)
    assert all(0 <= low < high < num for low, high in pairs)


@few_examples
@given(schedules, st.integers(2, 12), seeds)
def test_a_judge_that_never_answers_ends_every_schedule(schedule, num, seed):
    verdicts, _ = play(schedule, num, seed, lambda q: None)
    assert len(verdicts) == expected_pairs(schedule, num)


@few_examples
@given(schedules, st.integers(2, 12), seeds, shares)
def test_votes_and_both_orders_multiply_questions_not_pairs(schedule, num, seed, share):
    criterion = PAIR.model_copy(update={"answer": THREE})
    verdicts, _ = play(
        schedule, num, seed, random_judge(seed), criteria=(criterion,), both_orders=share
    )
    asked = Counter(
        (*p, v.vote, v.candidate_first) for p, v in zip(pairs_of(verdicts), verdicts, strict=True)
    )
    assert set(asked.values()) <= {1}
    orders = {p: {f for *q, _, f in asked if tuple(q) == p} for p in set(pairs_of(verdicts))}
    assert len(orders) == expected_pairs(schedule, num)
    assert len(verdicts) == 3 * sum(map(len, orders.values()))
    if share in (0, 1):
        assert {len(found) for found in orders.values()} == {1 + share}


def test_the_share_of_both_orders_is_kept_over_many_pools():
    asked = [len(ask(ALL, (), 16, seed, both_orders=0.1)) for seed in range(100)]
    assert 0.08 < sum(asked) / 12000 - 1 < 0.12


@given(st.integers(0, 12), seeds)
def test_criteria_without_opponent_ask_each_candidate_once_a_vote(num, seed):
    voted = PointwiseCriterion(form="pointwise", name="p", server="j", prompt="p", answer=THREE)
    for schedule in EACH:
        questions = ask(schedule, (), num, seed, (PAIR, SINGLE, voted))
        singles = [q for q in questions if q.criterion == "l"]
        assert [q.candidate for q in singles] == list(range(num))
        votes = [(q.candidate, q.vote) for q in questions if q.criterion == "p"]
        assert votes == [(c, v) for c in range(num) for v in range(3)]
        assert all(q.opponent == -1 and q.candidate_first for q in questions if q.criterion != "q")


@few_examples
@given(schedules, st.integers(2, 12), seeds, shares, st.data())
def test_what_has_a_verdict_even_a_missing_one_is_not_asked_again(schedule, num, seed, share, data):
    criteria = (PAIR, SINGLE)
    questions = ask(schedule, (), num, seed, criteria, both_orders=share)
    known = data.draw(st.sets(st.sampled_from(questions)))
    verdicts = [answer(q, data.draw(st.sampled_from([None, 0.5]))) for q in known]
    again = ask(schedule, verdicts, num, seed, criteria, both_orders=share)
    left = Counter(map(key, questions)) - Counter(map(key, known))
    of_pairs = [q for q in again if q.criterion == "q"]
    assert not set(map(key, again)) & (set(map(key, known)) - set(left))
    if any(name == "q" for name, *_ in left):
        assert Counter(map(key, again)) == left
    else:  # every pair of the round has its verdicts: the next round
        assert not set(pairs_of(of_pairs)) & {p for p in pairs_of(questions) if p[0] >= 0}
        assert Counter(map(key, again)) - Counter(map(key, of_pairs)) == left


def key(q):
    return q.criterion, q.candidate, q.opponent, q.vote


@few_examples
@given(schedules, st.integers(2, 12), seeds)
def test_a_verdict_the_other_way_round_answers_the_question(schedule, num, seed):
    asked = ask(schedule, (), num, seed)
    there = [answer(q, 0.25) for q in asked]
    swapped = [Verdict("q", v.opponent, v.candidate, 0, 0.75, "", v.candidate_first) for v in there]
    pairs = set(pairs_of(ask(schedule, swapped, num, seed)))
    assert pairs == set(pairs_of(ask(schedule, there, num, seed)))
    assert not pairs & set(pairs_of(asked))


@few_examples
@given(st.sampled_from(EACH[-3:]), st.integers(4, 16), seeds)
def test_the_order_of_verdicts_does_not_matter(schedule, num, seed):
    rng = np.random.default_rng(seed)
    asked = ask(schedule, (), num, seed, both_orders=0.5)
    verdicts = [answer(q, float(rng.random())) for q in asked]
    again = [ask(schedule, v, num, seed, both_orders=0.5) for v in (verdicts, verdicts[::-1])]
    assert again[0] == again[1]


@given(st.integers(1, 20), seeds, schedules)
def test_each_candidate_is_presented_first_in_half_of_its_pairs(num, seed, schedule):
    questions = ask(schedule, (), num, seed)
    first, met = first_places(questions), Counter(c for p in pairs_of(questions) for c in p)
    assert all(abs(first[c] - met[c] / 2) <= 0.5 for c in range(num))


@few_examples
@given(st.sampled_from(EACH[-3:]), st.integers(2, 20), seeds)
def test_later_rounds_even_out_who_was_first(schedule, num, seed):
    verdicts, _ = play(schedule, num, seed, random_judge(seed))
    first, met = first_places(verdicts), Counter(c for p in pairs_of(verdicts) for c in p)
    assert all(abs(first[c] - met[c] / 2) <= 1.5 for c in range(num))


@given(st.integers(3, 20), st.integers(1, 20), seeds)
def test_random_pairs_give_each_the_same_number_of_opponents(num, opponents, seed):
    questions = ask(RandomPairs(name="random_pairs", opponents=opponents), (), num, seed)
    met = Counter(c for p in pairs_of(questions) for c in p)
    degree = min(opponents, num - 1)
    assert sorted(met.values(), reverse=True)[: num - 1] == [degree] * (num - 1)
    assert sum(met.values()) == num * degree // 2 * 2
    if opponents >= 2:
        assert joined(pairs_of(questions), num)


def joined(pairs, num):
    reached = {0}
    for _ in range(num):
        reached |= {c for pair in pairs if reached & set(pair) for c in pair}
    return len(reached) == num


@given(st.integers(2, 20), seeds, st.data())
def test_pivot_meets_everybody(num, seed, data):
    pivot = data.draw(st.integers(0, num - 1))
    assert all(pivot in p for p in pairs_of(ask(Pivot(name="pivot"), (), num, seed, pivot=pivot)))
    drawn = {p for p in pairs_of(ask(Pivot(name="pivot"), (), num, seed))}
    assert set.intersection(*map(set, drawn))


def test_a_pivot_outside_the_pool_is_an_error():
    with pytest.raises(ValueError, match="pivot is 4"):
        ask(Pivot(name="pivot"), (), 4, 0, pivot=4)


@pytest.mark.parametrize("num", range(2, 21))
@pytest.mark.parametrize("scale", [1.0, 200.0], ids=["graded", "hard"])
def test_bracket_finds_best_and_worst_of_a_transitive_judge(num, scale):
    for seed in range(10):
        strengths = np.random.default_rng(seed).permutation(num) / num
        verdicts, rounds = play(EACH[4], num, seed, truth(strengths, scale))
        scores = pair_scores(EACH[4], pair_table(verdicts, num))
        assert (scores.argmax(), scores.argmin()) == (strengths.argmax(), strengths.argmin())
        assert rounds == 1 + math.ceil(math.log2(math.ceil(num / 2)))


@few_examples
@given(st.integers(2, 20), seeds)
def test_whoever_wins_the_bracket_scores_highest_if_there_is_no_tie(num, seed):
    rng = np.random.default_rng(seed)
    verdicts, _ = play(EACH[4], num, seed, lambda q: float(rng.random()))
    lost, won = set(), set()
    for v in verdicts:
        ahead = v.score > 0.5
        lost.add(v.opponent if ahead else v.candidate)
        won.add(v.candidate if ahead else v.opponent)
    scores = pair_scores(EACH[4], pair_table(verdicts, num))
    unbeaten, winless = set(range(num)) - lost, set(range(num)) - won
    assert len(unbeaten) <= 1 and len(winless) <= 1
    if num % 2 == 0:  # else the one without a partner may win in one half and lose in the other
        assert unbeaten and winless
    assert not unbeaten or unbeaten == {scores.argmax()}
    assert not winless or winless == {scores.argmin()}


def test_adaptive_finds_best_and_worst_of_16_with_a_quarter_of_the_questions():
    found = 0
    for seed in range(60):
        strengths = np.random.default_rng(seed).normal(size=16)
        verdicts, rounds = play(EACH[5], 16, seed, truth(strengths))
        assert len(verdicts) == 30 and rounds <= 6
        scores = pair_scores(EACH[5], pair_table(verdicts, 16))
        found += (scores.argmax(), scores.argmin()) == (strengths.argmax(), strengths.argmin())
    assert found >= 48


def test_what_a_question_is_worth_is_what_simulated_measurements_give():
    rng = np.random.default_rng(5)
    mean, root = rng.normal(size=5), rng.normal(size=(5, 5))
    covariance = root @ root.T / 5 + 0.1 * np.eye(5)
    low, high, noise = np.array([0, 1, 2]), np.array([3, 4, 3]), np.array([4.0, 5.0, 9.0])
    value, moves, variance = expected_gaps(mean, covariance, low, high, noise)
    true = rng.multivariate_normal(mean, covariance, size=200_000)
    for k in range(3):
        e = np.eye(5)[low[k]] - np.eye(5)[high[k]]
        measured = true @ e + rng.normal(size=len(true)) * math.sqrt(noise[k])
        narrower = np.linalg.inv(np.linalg.inv(covariance) + np.outer(e, e) / noise[k])
        after = (np.linalg.solve(covariance, mean) + np.outer(measured, e) / noise[k]) @ narrower
        assert value[k] == pytest.approx(np.ptp(after, axis=1).mean(), abs=0.01)
        left = covariance - np.outer(moves[:, k], moves[:, k]) / variance[k]
        np.testing.assert_allclose(left, narrower, atol=1e-12)


def test_a_round_counts_each_question_as_answered_when_it_chooses_the_next():
    schedule = EACH[6]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        verdicts = [answer(q, float(rng.random())) for q in ask(schedule, (), 10, seed)]
        table = pair_table(verdicts, 10)
        mean = bradley_terry(table)
        known = precision(mean, table)
        left = np.argwhere(np.triu(np.isnan(table), 1))
        noise = 2 + 2 * np.cosh(mean[left[:, 0]] - mean[left[:, 1]])
        expected = []
        chosen = ask(schedule, verdicts, 10, seed)
        assert len(chosen) == 4
        for _ in chosen:
            value, _, _ = expected_gaps(mean, np.linalg.inv(known), left[:, 0], left[:, 1], noise)
            value[[tuple(pair) in expected for pair in left]] = 0
            best = int(value.argmax())
            expected.append(tuple(left[best]))
            e = np.eye(10)[left[best][0]] - np.eye(10)[left[best][1]]
            known = known + np.outer(e, e) / noise[best]
        assert pairs_of(chosen) == expected


def test_adaptive_spends_its_refinement_on_both_ends():
    met = np.zeros(16)
    for seed in range(40):
        strengths = np.random.default_rng(seed).normal(size=16)
        verdicts, _ = play(EACH[5], 16, seed, truth(strengths))
        degree = Counter(c for p in pairs_of(verdicts) for c in p)
        met += [degree[c] for c in np.argsort(strengths)]
    assert min(met[0], met[-1]) > 1.5 * met[6:10].mean()


@few_examples
@given(schedules, st.integers(2, 12), seeds)
def test_a_second_criterion_is_scheduled_by_itself(schedule, num, seed):
    judge = random_judge(seed)
    memory = {}

    def remembered(q):
        return memory.setdefault((q.criterion, q.candidate, q.opponent), judge(q))

    alone, _ = play(schedule, num, seed, remembered)
    both, _ = play(schedule, num, seed, remembered, criteria=(OTHER, PAIR))
    assert [v for v in both if v.criterion == "q"] == alone


def test_the_seed_alone_decides_the_questions():
    orders = [ask(ALL, (), 2, seed)[0].candidate_first for seed in range(400)]
    assert 150 < sum(orders) < 250
    for schedule in EACH:
        assert ask(schedule, (), 9, 3) == ask(schedule, (), 9, 3) != ask(schedule, (), 9, 4)
