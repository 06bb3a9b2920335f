from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.config import LikelihoodCriterion, PairwiseCriterion
from megatron_sip.judge.schedules import next_questions
from megatron_sip.types import Verdict

PAIR = PairwiseCriterion(form="pairwise", name="q", server="j", prompt="quality_pairwise_v1")
SINGLE = LikelihoodCriterion(form="likelihood", name="l", server="j")
sizes, seeds = st.integers(0, 12), st.integers(0, 2**31)


def ask(verdicts, num, seed, criteria=(PAIR, SINGLE)):
    return next_questions("all_pairs", verdicts, num, seed, criteria=criteria)


def answer(question, score=0.5, *, swap=False):
    i, j = question.candidate, question.opponent
    i, j = (j, i) if swap and j >= 0 else (i, j)
    return Verdict(question.criterion, i, j, question.vote, score, "")


@given(sizes, seeds)
def test_each_pair_and_each_candidate_is_asked_once(num, seed):
    questions = ask((), num, seed)
    pairs = [frozenset((q.candidate, q.opponent)) for q in questions if q.criterion == "q"]
    assert len(pairs) == len(set(pairs)) == num * (num - 1) // 2
    singles = [q for q in questions if q.criterion == "l"]
    assert [q.candidate for q in singles] == list(range(num))
    assert all(q.opponent == -1 and q.candidate_first for q in singles)


@given(sizes, seeds, st.data())
def test_what_has_a_verdict_even_a_missing_one_is_not_asked_again(num, seed, data):
    questions = ask((), num, seed)
    known = data.draw(st.sets(st.sampled_from(questions)) if questions else st.just(set()))
    verdicts = [answer(q, data.draw(st.sampled_from([None, 0.5])), swap=True) for q in known]
    assert set(ask(verdicts, num, seed)) == set(questions) - known
    assert ask([answer(q, None) for q in questions], num, seed) == ()


@given(st.integers(1, 12), seeds)
def test_each_candidate_is_presented_first_in_half_of_its_pairs(num, seed):
    first = Counter()
    for q in ask((), num, seed, (PAIR,)):
        first[q.candidate if q.candidate_first else q.opponent] += 1
    assert all(abs(first[c] - (num - 1) / 2) <= 0.5 for c in range(num))


def test_the_order_depends_on_the_seed_and_over_seeds_on_nothing_else():
    orders = [ask((), 2, seed, (PAIR,))[0].candidate_first for seed in range(400)]
    assert 150 < sum(orders) < 250
    assert ask((), 9, 3) == ask((), 9, 3) != ask((), 9, 4)


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="all_pairs"):
        next_questions("bracket", (), 2, 0, criteria=(PAIR,))
