"""Verdicts to rewards. Pure; method section 3.2. Legend: C candidates, V verdicts.

Pairwise: what `pair_scores` makes of the pairs, in [0, 1]; with every verdict of all pairs present
the sum over a pool is C / 2. Other forms: mean over votes. The total is the sum of weight x score,
each criterion's scores brought to its scale first. A missing verdict enters no mean, and one that
is not finite is missing; ties are left as they are. A gate looks at the score as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_sip.config_judge import Criterion, Schedule
from megatron_sip.judge.pair_scores import pair_scores, pair_table
from megatron_sip.types import PoolRewards, Verdict


def finite_or_missing(verdict: Verdict) -> Verdict:
    """The verdict itself, or without its score if that is NaN or infinite: no reward is made of it.
    """  # fmt: skip
    if verdict.score is None or math.isfinite(verdict.score):
        return verdict
    return replace(verdict, score=None, reply=f"not usable: the score is {verdict.score}")


def score_pool(
    verdicts: Sequence[Verdict],
    num_candidates: int,
    criteria: Sequence[Criterion],
    schedule: Schedule,
) -> PoolRewards:
    """Scores and totals of one pool.

    Args:    verdicts: V, in any order; score None where missing. schedule: that asked the pairs.
    Returns: by_criterion float32[C] (NaN without a verdict), total float32[C] (NaN where
             invalid), valid bool[C]: at least half of the verdicts, and one, in each criterion,
             and a total that float32 can hold; passes bool[C]: valid, and no gated score is below
             its gate.
    """
    verdicts = [finite_or_missing(v) for v in verdicts]
    by_criterion = {}
    total_C = np.zeros(num_candidates)
    valid_C = np.ones(num_candidates, dtype=bool)
    passes_C = np.ones(num_candidates, dtype=bool)
    for criterion in criteria:
        mine = [v for v in verdicts if v.criterion == criterion.name]
        sum_C, present_C, asked_C = _tally(mine, num_candidates)
        if criterion.form == "pairwise":
            score_C = pair_scores(schedule, pair_table(mine, num_candidates))
        else:
            score_C = np.full(num_candidates, np.nan)
            np.divide(sum_C, present_C, out=score_C, where=present_C > 0)
        by_criterion[criterion.name] = score_C.astype(np.float32)
        valid_C &= (present_C > 0) & (2 * present_C >= asked_C)
        if criterion.gate is not None:
            passes_C &= score_C >= criterion.gate
        total_C += criterion.weight * normalized(score_C, criterion.normalize)
    with np.errstate(over="ignore"):
        total_C = total_C.astype(np.float32)
    valid_C &= np.isfinite(total_C)
    return PoolRewards(
        by_criterion=by_criterion,
        total=np.where(valid_C, total_C, np.float32(np.nan)),
        valid=valid_C,
        num_missing=sum(v.score is None for v in verdicts),
        passes=valid_C & passes_C,
    )


def normalized(score_C: np.ndarray, scale: str) -> np.ndarray:
    """Scores of one pool on a criterion's scale; NaN stays NaN.

    Args: scale: "none". "rank": place among the scores that are there, from 0 for the smallest to
          1 for the largest, equal scores share the mean of their places, 0.5 for a score alone.
          "standard": minus their mean, divided by their standard deviation (of the population); 0
          where all are equal.
    """
    if scale == "none":
        return score_C
    there = ~np.isnan(score_C)
    known, out_C = score_C[there], np.full(len(score_C), np.nan)
    if scale == "rank":
        places = [((known < x).sum() + (known <= x).sum() - 1) / 2 for x in known]
        out_C[there] = np.array(places) / (len(known) - 1) if len(known) > 1 else 0.5
    else:
        spread = known.std() if len(known) else 0.0
        out_C[there] = (known - known.mean()) / spread if spread > 0 else 0.0
    return out_C


def vote_agreement(verdicts: Sequence[Verdict]) -> tuple[int, int]:
    """(votes on the side of most of their question's votes, votes), of questions with several.

    The side of a score is above or below one half; exactly one half is a side of its own.
    """
    sides: dict[tuple[str, int, int, bool], list[int]] = {}
    for v in verdicts:
        if v.score is not None:
            key = (v.criterion, v.candidate, v.opponent, v.candidate_first)
            sides.setdefault(key, []).append((v.score > 0.5) - (v.score < 0.5))
    several = [found for found in sides.values() if len(found) > 1]
    agree = sum(max(found.count(side) for side in set(found)) for found in several)
    return agree, sum(map(len, several))


def _tally(
    verdicts: Sequence[Verdict], num_candidates: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum of scores float64[C], verdicts with a score int64[C], verdicts int64[C]."""
    sum_C = np.zeros(num_candidates)
    present_C = np.zeros(num_candidates, dtype=np.int64)
    asked_C = np.zeros(num_candidates, dtype=np.int64)
    for verdict in verdicts:
        for candidate in (verdict.candidate, verdict.opponent):
            if candidate >= 0:
                asked_C[candidate] += 1
                present_C[candidate] += verdict.score is not None
        if verdict.score is not None:
            sum_C[verdict.candidate] += verdict.score  # of pairs `pair_scores` makes the sums
    return sum_C, present_C, asked_C
