"""Which questions to ask about a pool, in rounds. Pure.

A schedule sees the verdicts so far and names the next questions; an empty answer means done. A
question that has a verdict, even a missing one, is not asked again. Each pairwise criterion is
scheduled by itself; the others ask about each candidate in the first round.

A schedule is a function of its section and a `PoolState` that gives all presentations which should
have been asked by now; those without a verdict are the next round. It counts pairs: votes multiply
its questions, and the share `both_orders` of the pairs doubles theirs, on top of any budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from megatron_sip.config_judge import AskedCriterion, PromptedCriterion, Reasoned, Schedule
from megatron_sip.judge.criteria import is_pairwise
from megatron_sip.judge.pair_scores import pair_table
from megatron_sip.judge.schedules.adaptive import adaptive
from megatron_sip.judge.schedules.all_pairs import all_pairs
from megatron_sip.judge.schedules.bracket import bracket
from megatron_sip.judge.schedules.pivot import against_pivot
from megatron_sip.judge.schedules.pool_state import (
    Pair,
    PoolState,
    Presentation,
    hashed,
    pair_of,
)
from megatron_sip.judge.schedules.random_pairs import random_pairs
from megatron_sip.types import Question, Verdict

SCHEDULES: dict[str, Callable[..., list[Presentation]]] = {
    "all_pairs": all_pairs,
    "random_pairs": random_pairs,
    "pivot": against_pivot,
    "bracket": bracket,
    "adaptive": adaptive,
}


def next_questions(
    schedule: Schedule,
    verdicts: Sequence[Verdict],
    num_candidates: int,
    seed: int,
    *,
    criteria: Sequence[AskedCriterion],
    both_orders: float = 0.0,
    pivot: int | None = None,
) -> tuple[Question, ...]:
    """The next round of questions about one pool, () when done.

    Args:   verdicts: all that are known of this pool, in any order.
            seed: of this pool; decides who meets whom, orders of presentation and ties.
            both_orders: share of the pairs in [0, 1] that are asked in both orders.
            pivot: index in the pool that the schedule pivot compares with; None: one is drawn.
    Raises: ValueError if the pivot is not in the pool.
    """
    if pivot is not None and not 0 <= pivot < num_candidates:
        raise ValueError(f"pivot is {pivot}; it must be in [0, {num_candidates}) or None")
    questions: list[Question] = []
    for criterion in criteria:
        mine = [v for v in verdicts if v.criterion == criterion.name]
        if is_pairwise(criterion):
            pool = _Pool(criterion, mine, num_candidates, seed, both_orders)
            questions += pool.next_round(schedule, pivot)
        else:
            known = {(v.candidate, v.vote) for v in mine}
            questions += [
                Question(criterion.name, candidate, -1, vote, True)
                for candidate in range(num_candidates)
                for vote in range(votes_of(criterion))
                if (candidate, vote) not in known
            ]
    return tuple(questions)


def votes_of(criterion: AskedCriterion) -> int:
    """How often each of its questions is asked."""
    answer = criterion.answer if isinstance(criterion, PromptedCriterion) else None
    return answer.votes if isinstance(answer, Reasoned) else 1


class _Pool:
    """One pool under one pairwise criterion: from presentations to questions and back."""

    def __init__(
        self,
        criterion: AskedCriterion,
        verdicts: Sequence[Verdict],
        num_candidates: int,
        seed: int,
        both_orders: float,
    ) -> None:
        self._name, self._seed, self._share = criterion.name, seed, both_orders
        self._votes = votes_of(criterion)
        self._num, self._verdicts = num_candidates, verdicts
        self._known: dict[Pair, set[tuple[int, int]]] = defaultdict(set)  # of (vote, who is first)
        for v in verdicts:
            first = v.candidate if v.candidate_first else v.opponent
            self._known[pair_of(v.candidate, v.opponent)].add((v.vote, first))
        self._first = {pair: self._shown_first(pair) for pair in self._known}

    def next_round(self, schedule: Schedule, pivot: int | None) -> list[Question]:
        settled = (p for p in self._first if not any(self._unanswered(p, self._first[p])))
        state = PoolState(
            num_candidates=self._num,
            seed=self._seed,
            criterion=self._name,
            pivot=pivot,
            table=pair_table(self._verdicts, self._num),
            asked=self._first,
            settled=frozenset(settled),
        )
        presentations = SCHEDULES[schedule.name](schedule, state)
        return [q for shown in presentations for q in self._unanswered(pair_of(*shown), shown[0])]

    def _unanswered(self, pair: Pair, first: int) -> Iterator[Question]:
        """Its questions that have no verdict; one order asked either way will do unless both are.
        """  # fmt: skip
        low, high = pair
        known = self._known.get(pair, ())
        both = self._share > 0 and self._in_both_orders(pair)
        for vote in range(self._votes):
            for shown in (first, low + high - first) if both else (first,):
                answered = (vote, shown) in known
                if not both:
                    answered = (vote, low) in known or (vote, high) in known
                if not answered:
                    yield Question(self._name, low, high, vote, shown == low)

    def _shown_first(self, pair: Pair) -> int:
        """Of a known pair; a seeded bit decides where it was asked in both orders."""
        firsts = sorted({first for _, first in self._known[pair]})
        return firsts[hashed(self._seed, self._name, "shown", *pair) % len(firsts)]

    def _in_both_orders(self, pair: Pair) -> bool:
        return hashed(self._seed, self._name, "both", *pair) < self._share * 2**64
