"""Which questions to ask about a pool, in rounds. Pure.

A schedule sees the verdicts so far and names the next questions; an empty answer means done. A
question that has a verdict, even a missing one, is not asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from megatron_sip import config
from megatron_sip.judge.criteria import is_pairwise
from megatron_sip.types import Question, Verdict


def next_questions(
    schedule: str,
    verdicts: Sequence[Verdict],
    num_candidates: int,
    seed: int,
    *,
    criteria: Sequence[config.AskedCriterion],
) -> tuple[Question, ...]:
    """The next round of questions about one pool, () when done.

    Args:   verdicts: all that are known of this pool, in any order.
            seed: of this pool; decides orders of presentation and nothing else.
    Raises: ValueError if the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'judge.schedule is "{schedule}"; it must be among {sorted(SCHEDULES)}')
    return SCHEDULES[schedule](verdicts, num_candidates, seed, criteria)


def all_pairs(
    verdicts: Sequence[Verdict],
    num_candidates: int,
    seed: int,
    criteria: Sequence[config.AskedCriterion],
) -> tuple[Question, ...]:
    """One round: each unordered pair once, or each candidate once where there is no opponent."""
    known = {(v.criterion, v.candidate, v.opponent, v.vote) for v in verdicts}
    known |= {(v.criterion, v.opponent, v.candidate, v.vote) for v in verdicts if v.opponent >= 0}
    questions = []
    for criterion in criteria:
        if is_pairwise(criterion):
            first = _presented_first(num_candidates, seed, criterion.name)
            for i in range(num_candidates):
                for j in range(i + 1, num_candidates):
                    questions.append(Question(criterion.name, i, j, 0, first[i, j]))
        else:
            questions += [Question(criterion.name, i, -1, 0, True) for i in range(num_candidates)]
    return tuple(
        q for q in questions if (q.criterion, q.candidate, q.opponent, q.vote) not in known
    )


def _presented_first(num_candidates: int, seed: int, name: str) -> dict[tuple[int, int], bool]:
    """For each pair i < j whether i is presented first.

    Balanced: a candidate is first in half of its pairs (rounded up or down), whatever the seed.
    Candidates are seated on a circle in seeded order; each is first against the half that
    follows it, and a seeded bit decides between opposite seats.
    """
    seat = {
        c: s
        for s, c in enumerate(sorted(range(num_candidates), key=lambda c: _hash(seed, name, c)))
    }
    first = {}
    for i in range(num_candidates):
        for j in range(i + 1, num_candidates):
            ahead = (seat[j] - seat[i]) % num_candidates
            if 2 * ahead == num_candidates:
                first[i, j] = bool(_hash(seed, name, i, j) & 1)
            else:
                first[i, j] = 2 * ahead < num_candidates
    return first


def _hash(*parts: int | str) -> int:
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


SCHEDULES: dict[str, Callable[..., tuple[Question, ...]]] = {"all_pairs": all_pairs}
