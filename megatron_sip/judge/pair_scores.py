"""Pairwise verdicts of one pool to a table, strengths and scores. Pure, float64.

Legend: C candidates. In the table P(row beats column), NaN where no verdict says so; the two
halves sum to 1. Votes are averaged. Where both orders of presentation were asked and disagree the
vote is a tie, 0.5.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from megatron_sip.config_judge import Schedule
from megatron_sip.types import Verdict

RIDGE = 0.3
"""Precision of the prior on a log-strength. It holds who is undefeated, and keeps a candidate of
few verdicts from being called the best by luck; judge_schedules shows what it costs."""
TOLERANCE, MAX_STEPS = 1e-11, 100


def pair_table(verdicts: Sequence[Verdict], num_candidates: int) -> np.ndarray:
    """P(row beats column) of one criterion.

    Args:    verdicts: pairwise, of one criterion, in any order; a score that is None or not
             finite is missing. Score is P(candidate beats opponent) in either order.
    Returns: float64[C, C], NaN on the diagonal and where there is no verdict.
    """
    table = np.full((num_candidates, num_candidates), np.nan)
    votes = defaultdict(list)
    for (_, low, high, _), by_first in _by_vote(verdicts).items():
        votes[low, high].append(_decided(by_first))
    for (low, high), values in votes.items():
        table[low, high] = fmean(values)
        table[high, low] = 1.0 - table[low, high]
    return table


def order_consistency(verdicts: Sequence[Verdict]) -> tuple[int, int]:
    """Votes on a pair whose two orders agree, and votes with a verdict in both orders.

    They disagree if one says more than 0.5 and the other less. Several criteria may be mixed.
    """
    both = [found for found in _by_vote(verdicts).values() if len(found) == 2]
    return sum(not _disagree(*found.values()) for found in both), len(both)


def bradley_terry(table: np.ndarray, *, ridge: float = RIDGE) -> np.ndarray:
    """Log-strengths theta: P(i beats j) = sigma(theta_i - theta_j).

    The maximum of sum_{i<j} [p_ij log sigma(theta_i - theta_j) + p_ji log sigma(theta_j -
    theta_i)] - ridge/2 |theta|^2 over the judged pairs, by Newton steps with halving. It is
    unique; its mean is 0, also in each group of candidates that no verdict joins to the rest.

    Args:    table: float64[C, C] as of `pair_table`.
             ridge: > 0, precision of the prior.
    Returns: float64[C], nats; 0 for a candidate without a verdict.
    Raises:  ValueError if ridge is not positive.
    Source:  Bradley and Terry (1952) with fractional wins and a Gaussian prior.
    """
    if ridge <= 0:
        raise ValueError(f"ridge is {ridge}; it must be positive for the maximum to be unique")
    theta = np.zeros(len(table))
    wins = np.nan_to_num(table)
    value = _loss(theta, wins, ridge)
    for _ in range(MAX_STEPS):
        gradient = _gradient(theta, table, ridge)
        if not gradient.size or abs(gradient).max() < TOLERANCE:
            break
        step = np.linalg.solve(precision(theta, table, ridge=ridge), gradient)
        slope = float(gradient @ step)
        size = 1.0
        while size > 1e-6:
            moved = _loss(theta - size * step, wins, ridge)
            if moved <= value - 1e-4 * size * slope + 1e-13 * (1 + abs(value)):
                break
            size /= 2
        theta = theta - size * step
        value = _loss(theta, wins, ridge)
    return theta - theta.mean() if len(theta) else theta


def precision(theta: np.ndarray, table: np.ndarray, *, ridge: float = RIDGE) -> np.ndarray:
    """Minus the second derivative of the penalised log-likelihood at theta: float64[C, C].

    Its inverse is the covariance of Laplace's approximation.
    """
    chance = win_chances(theta)
    weights = np.where(np.isnan(table), 0.0, chance * (1 - chance))
    return np.diag(weights.sum(axis=1) + ridge) - weights


def win_chances(theta: np.ndarray) -> np.ndarray:
    """sigma(theta_i - theta_j), float64[C, C]."""
    return 0.5 * (1.0 + np.tanh(0.5 * (theta[:, None] - theta[None, :])))


def pair_scores(schedule: Schedule, table: np.ndarray) -> np.ndarray:
    """Score of each candidate, float64[C] in [0, 1]; NaN for one without a verdict.

    all_pairs, random_pairs, pivot: mean over its judged pairs (method 3.2). bracket, adaptive: who
    meets whom depends on strength, so a mean would flatter the weak; it is the expected win rate
    against the other judged candidates, sum_j sigma(theta_i - theta_j) / (C - 1). Either way the
    sum over a pool is C / 2 where all pairs are judged, for the latter always.

    Bradley-Terry alone does not promise that a bracket's winner comes first. Among those that no
    verdict beat (with all verdicts and no tie that is the winner alone) the one of highest score
    gets the pool's highest score and those above it move down by one place; likewise the loser.

    Args: table: float64[C, C] as of `pair_table`.
    """
    judged = ~np.isnan(table).all(axis=1)
    scores = np.full(len(table), np.nan)
    if not judged.any():
        return scores
    if schedule.name not in ("bracket", "adaptive"):
        scores[judged] = np.nanmean(table[judged], axis=1)
        return scores
    chance = win_chances(bradley_terry(table)[judged])
    scores[judged] = (chance.sum(axis=1) - 0.5) / (judged.sum() - 1)
    return _extremes_outermost(scores, table) if schedule.name == "bracket" else scores


def _extremes_outermost(scores: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The same scores, dealt so that a bracket's winner and loser are first and last."""
    judged = np.flatnonzero(~np.isnan(scores))
    unbeaten = [i for i in judged if not (table[i] < 0.5).any()]
    winless = [i for i in judged if not (table[i] > 0.5).any()]
    order = sorted(judged, key=lambda i: scores[i])
    values = np.sort(scores[judged])
    if unbeaten:
        winner = max(unbeaten, key=lambda i: scores[i])
        order.remove(winner)
        order.append(winner)
    if winless:
        loser = min(winless, key=lambda i: scores[i])
        if loser != order[-1]:
            order.remove(loser)
            order.insert(0, loser)
    dealt = scores.copy()
    dealt[order] = values
    return dealt


def _by_vote(verdicts: Sequence[Verdict]) -> dict[tuple[str, int, int, int], dict[int, float]]:
    """(criterion, low, high, vote) -> {who was presented first: P(low beats high)}."""
    found: dict[tuple[str, int, int, int], dict[int, float]] = defaultdict(dict)
    for v in verdicts:
        if v.opponent < 0 or v.score is None or not math.isfinite(v.score):
            continue
        low, high = sorted((v.candidate, v.opponent))
        first = v.candidate if v.candidate_first else v.opponent
        score = v.score if v.candidate == low else 1.0 - v.score
        found[v.criterion, low, high, v.vote][first] = score
    return found


def _decided(by_first: dict[int, float]) -> float:
    values = list(by_first.values())
    return 0.5 if len(values) == 2 and _disagree(*values) else fmean(values)


def _disagree(one: float, other: float) -> bool:
    return min(one, other) < 0.5 < max(one, other)


def _loss(theta: np.ndarray, wins: np.ndarray, ridge: float) -> float:
    """Minus the penalised log-likelihood."""
    behind = theta[None, :] - theta[:, None]
    return float((wins * np.logaddexp(0.0, behind)).sum() + 0.5 * ridge * theta @ theta)


def _gradient(theta: np.ndarray, table: np.ndarray, ridge: float) -> np.ndarray:
    """Of `_loss`."""
    return np.nan_to_num(win_chances(theta) - table).sum(axis=1) + ridge * theta
