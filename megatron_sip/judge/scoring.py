"""Verdicts to rewards. Pure; method section 3.2. Legend: C candidates, V verdicts.

Pairwise: Q(y) = mean over judged pairs of P(y beats its opponent), in [0, 1]; with every verdict
present the sum over a pool is C / 2. Other forms: mean over votes. The total is the sum of
weight * score. A missing verdict enters no mean, and one that is not finite is missing; ties are
left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_sip import config
from megatron_sip.types import PoolRewards, Verdict


def finite_or_missing(verdict: Verdict) -> Verdict:
    """The verdict itself, or without its score if that is NaN or infinite: no reward is made of it.
    """  # fmt: skip
    if verdict.score is None or math.isfinite(verdict.score):
        return verdict
    return replace(verdict, score=None, reply=f"not usable: the score is {verdict.score}")


def score_pool(
    verdicts: Sequence[Verdict], num_candidates: int, criteria: Sequence[config.Criterion]
) -> PoolRewards:
    """Scores and totals of one pool.

    Args:    verdicts: V, in any order; score None where missing.
    Returns: by_criterion float32[C] (NaN without a verdict), total float32[C] (NaN where
             invalid), valid bool[C]: at least half of the verdicts, and one, in each criterion,
             and a total that float32 can hold.
    """
    verdicts = [finite_or_missing(v) for v in verdicts]
    by_criterion = {}
    total_C = np.zeros(num_candidates)
    valid_C = np.ones(num_candidates, dtype=bool)
    for criterion in criteria:
        mine = [v for v in verdicts if v.criterion == criterion.name]
        sum_C, present_C, asked_C = _tally(mine, num_candidates)
        score_C = np.full(num_candidates, np.nan)
        np.divide(sum_C, present_C, out=score_C, where=present_C > 0)
        by_criterion[criterion.name] = score_C.astype(np.float32)
        valid_C &= (present_C > 0) & (2 * present_C >= asked_C)
        total_C += criterion.weight * score_C
    with np.errstate(over="ignore"):
        total_C = total_C.astype(np.float32)
    valid_C &= np.isfinite(total_C)
    return PoolRewards(
        by_criterion=by_criterion,
        total=np.where(valid_C, total_C, np.float32(np.nan)),
        valid=valid_C,
        num_missing=sum(v.score is None for v in verdicts),
    )


def _tally(
    verdicts: Sequence[Verdict], num_candidates: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum of scores float64[C], verdicts with a score int64[C], verdicts int64[C]."""
    sum_C = np.zeros(num_candidates)
    present_C = np.zeros(num_candidates, dtype=np.int64)
    asked_C = np.zeros(num_candidates, dtype=np.int64)
    for verdict in verdicts:
        sides = [(verdict.candidate, verdict.score)]
        if verdict.opponent >= 0:
            sides.append((verdict.opponent, _other_side(verdict.score)))
        for candidate, score in sides:
            asked_C[candidate] += 1
            if score is not None:
                sum_C[candidate] += score
                present_C[candidate] += 1
    return sum_C, present_C, asked_C


def _other_side(score: float | None) -> float | None:
    return None if score is None else 1.0 - score
