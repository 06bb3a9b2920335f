"""A ring of all candidates, then the pairs that tell most about the best and the worst. Pure.

After the ring come up to REFINING_ROUNDS rounds. Before each, log-strengths get a Gaussian
posterior: Bradley-Terry's maximum m and Laplace's covariance S. A question on the pair (i, j) would
move the means along the column d = S (e_i - e_j) by d z / sqrt(d_i - d_j + 1 / (p (1 - p))), z
normal: what it is worth is how much it is expected to raise max(m) - min(m), the gap between the
picked best and worst (the knowledge gradient). The pairs of a round are chosen one after the
other; each narrows S at once, while m waits for the verdicts.

Source: Frazier, Powell and Dayanik, The knowledge-gradient policy for correlated normal beliefs,
INFORMS Journal on Computing 21 (2009); for a maximum there, for the gap here.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_sip.config_judge import Adaptive
from megatron_sip.judge.pair_scores import bradley_terry, precision
from megatron_sip.judge.schedules.pool_state import (
    Pair,
    PoolState,
    Presentation,
    balanced,
    pair_of,
)

REFINING_ROUNDS = 5
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(7)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def budget_of(schedule: Adaptive, num_candidates: int) -> int:
    """Pairs that may be asked: the share of all pairs, at least half as many again as a ring, at
    most all pairs."""
    pairs = num_candidates * (num_candidates - 1) // 2
    least = math.ceil(1.5 * num_candidates)
    return min(pairs, max(least, math.floor(schedule.budget * pairs)))


def adaptive(schedule: Adaptive, state: PoolState) -> list[Presentation]:
    """The pairs asked so far and, once all of these have verdicts, the next round's."""
    num, seats = state.num_candidates, state.seated()
    budget = budget_of(schedule, num)
    ring = [(seats[s], seats[(s + 1) % num]) for s in range(num if num > 2 else num - 1)]
    in_ring = {pair_of(*shown) for shown in ring}
    shown = ring + balanced((p for p in state.asked if p not in in_ring), ring, state)
    pairs = {pair_of(*presentation) for presentation in shown}
    left = budget - len(pairs)
    if left <= 0 or not state.settled.issuperset(pairs):
        return shown
    batch = min(left, math.ceil((budget - len(ring)) / REFINING_ROUNDS))
    return shown + balanced(_most_telling(batch, pairs, state), shown, state)


def _most_telling(count: int, asked: set[Pair], state: PoolState) -> list[Pair]:
    """`count` pairs that have not been asked; a seeded order decides between equals."""
    mean = bradley_terry(state.table)
    covariance = np.linalg.inv(precision(mean, state.table))
    num = state.num_candidates
    open_pairs = [(i, j) for i in range(num) for j in range(i + 1, num) if (i, j) not in asked]
    order = np.random.default_rng(state.draw("open")).permutation(len(open_pairs))
    low, high = np.array(open_pairs)[order].T
    noise = 2.0 + 2.0 * np.cosh(mean[low] - mean[high])  # 1 / (p (1 - p))
    free = np.ones(len(low), dtype=bool)
    chosen = []
    for _ in range(count):
        value, moves, variance = expected_gaps(mean, covariance, low, high, noise)
        best = int(np.where(free, value.round(9), -np.inf).argmax())  # not by the last bits
        free[best] = False
        chosen.append((int(low[best]), int(high[best])))
        move = moves[:, best]
        covariance = covariance - np.outer(move, move) / variance[best]
    return chosen


def expected_gaps(
    mean: np.ndarray, covariance: np.ndarray, low: np.ndarray, high: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected max - min of the means after one question on each of Q pairs.

    Args:    mean float64[C], covariance float64[C, C], low and high int64[Q], noise float64[Q]:
             variance of a verdict as a measurement of the difference of log-strengths.
    Returns: value float64[Q], columns S (e_low - e_high) float64[C, Q], and the variance of what
             would be measured float64[Q].
    """
    moves = covariance[:, low] - covariance[:, high]
    at = np.arange(len(low))
    variance = moves[low, at] - moves[high, at] + noise
    after = mean[:, None, None] + (moves / np.sqrt(variance))[:, :, None] * NODES
    return (after.max(axis=0) - after.min(axis=0)) @ WEIGHTS, moves, variance
