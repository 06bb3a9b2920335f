"""How far two judges agree on the same pools. Pure; legend: C candidates of one pool.

A judge's opinion of a pool is an order of its candidates, so every measure reads places and no
reward's size. Only candidates that are valid for both judges are compared. A measure that a pool
does not define (one candidate; one judge calls all equal) is NaN there and is left out of the mean.

    same_best    |A and B| / |A or B|, with A and B the candidates that share the best place of
                 either judge: 1 for the same set, 0 for sets apart; same_worst likewise
    spearman     Pearson's correlation of the places, tied candidates at the mean of theirs
    kendall      tau-b = (concordant - discordant) / sqrt((P - ties_a) (P - ties_b)), P all pairs
    pair_order   share of the ledger's live (chosen, rejected) pairs that the other judge orders in
                 the same way, a tie half

Chance is what an order drawn at random would get: 0 for the correlations, 1/2 for pair_order, 1/C
for best and worst; with ties their mean over all sets B of this size.
Source: Kendall 1945 (tau-b); Jaccard 1912 (same_best).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sip.evaluation.statistics import bootstrap_interval
from megatron_sip.types import Pick, PoolRewards

MEASURES = ("same_best", "same_worst", "spearman", "kendall", "pair_order")


@dataclass(frozen=True)
class PoolAgreement:
    """Two judges on one pool; NaN where a measure is not defined."""

    compared: int  # candidates that are valid for both
    values: dict[str, float]  # measure -> value
    chance: dict[str, float]  # measure -> value of a random order


@dataclass(frozen=True)
class Agreement:
    """One measure over many pools."""

    measure: str
    mean: float | None  # None: no pool defines it
    low: float | None  # 95 % interval; None: of fewer than two documents
    high: float | None
    chance: float | None
    pools: int  # that define it


def standing(rewards: PoolRewards) -> np.ndarray:
    """Places of a pool's candidates as the trainer orders them: by (passes every gate, total).

    Returns: float64[C], rising with preference, equal for equals, NaN where invalid.
    """
    place_C = np.full(len(rewards.total), np.nan)
    keys = [(bool(p), float(t)) for p, t in zip(rewards.passes, rewards.total, strict=True)]
    order = sorted({key for key, valid in zip(keys, rewards.valid, strict=True) if valid})
    for i in np.flatnonzero(rewards.valid):
        place_C[i] = order.index(keys[i])
    return place_C


def agreement(
    a_C: np.ndarray, b_C: np.ndarray, *, pairs: Sequence[tuple[int, int]]
) -> PoolAgreement:
    """Compare two judges' places (or rewards) of one pool.

    Args:   a_C, b_C: float[C], NaN where invalid; a is the ledger's judge, b the other.
            pairs: (chosen, rejected) of the ledger, as `live_pairs` gives them.
    Raises: ValueError if the two are not of one pool.
    """
    a, b = np.asarray(a_C, np.float64), np.asarray(b_C, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"rewards of shapes {a.shape} and {b.shape} are not of one pool")
    both = ~(np.isnan(a) | np.isnan(b))
    kept = [
        0.5 + 0.5 * float(np.sign(b[chosen] - b[rejected]))
        for chosen, rejected in pairs
        if both[chosen] and both[rejected]
    ]
    a, b = a[both], b[both]
    best, best_chance = _same_set(a == a.max(initial=-math.inf), b == b.max(initial=-math.inf))
    worst, worst_chance = _same_set(a == a.min(initial=math.inf), b == b.min(initial=math.inf))
    values = {
        "same_best": best, "same_worst": worst, "spearman": spearman(a, b),
        "kendall": kendall(a, b), "pair_order": math.fsum(kept) / len(kept) if kept else math.nan,
    }  # fmt: skip
    chance = {"same_best": best_chance, "same_worst": worst_chance}
    chance |= {"spearman": 0.0, "kendall": 0.0, "pair_order": 0.5}
    return PoolAgreement(int(both.sum()), values, chance)


def live_pairs(picks: Sequence[Pick]) -> tuple[tuple[int, int], ...]:
    """(chosen, rejected) of a pool that were trained on; `chosen` and `rejected` stand in turn."""
    chosen = [p for p in picks if p.role == "chosen"]
    rejected = [p for p in picks if p.role == "rejected"]
    if len(chosen) != len(rejected):  # no objective on pairs made these
        return ()
    return tuple(
        (c.candidate, r.candidate)
        for c, r in zip(chosen, rejected, strict=True)
        if c.weight > 0 and c.candidate >= 0 and r.candidate >= 0
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation in [-1, 1]; NaN for fewer than 2 candidates or where one judge ties all."""
    x, y = (_mean_places(v) - (len(v) - 1) / 2 for v in (a, b))
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return max(-1.0, min(1.0, float((x * y).sum()) / scale)) if scale else math.nan


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Tau-b in [-1, 1]; NaN for fewer than 2 candidates or where one judge ties all."""
    first, second = np.triu_indices(len(a), 1)
    x, y = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
    scale = math.sqrt(np.count_nonzero(x)) * math.sqrt(np.count_nonzero(y))
    return max(-1.0, min(1.0, float((x * y).sum()) / scale)) if scale else math.nan


def summarize(
    pools: Sequence[PoolAgreement],
    *,
    documents: Sequence[Hashable],
    resamples: int,
    seed: int,
) -> tuple[Agreement, ...]:
    """Each measure's mean with its 95 % bootstrap interval, and chance over the same pools.

    Args: documents: of each pool; pools of one document are alike and are drawn together.
    """
    found = []
    for name in MEASURES:
        rows = [i for i, pool in enumerate(pools) if not math.isnan(pool.values[name])]
        values = [pools[i].values[name] for i in rows]
        owners = [documents[i] for i in rows]
        low = high = None
        if len(set(owners)) > 1:
            low, high = bootstrap_interval(values, groups=owners, resamples=resamples, seed=seed)
        chance = mean_or_none([pools[i].chance[name] for i in rows])
        found.append(Agreement(name, mean_or_none(values), low, high, chance, len(rows)))
    return tuple(found)


def mean_or_none(values: Sequence[float]) -> float | None:
    """Mean of what is not NaN; None without any."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None


def _mean_places(values: np.ndarray) -> np.ndarray:
    """Places from 0; equals share the mean of theirs."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2


def _same_set(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Share of the members of either set that are in both; its mean over all sets of b's size.

    NaN for fewer than 2 candidates.
    """
    number, m, n = len(a), int(a.sum()), int(b.sum())
    if number < 2:
        return math.nan, math.nan
    overlap = int((a & b).sum())
    ways = math.comb(number, n)
    chance = math.fsum(
        math.comb(m, k) * math.comb(number - m, n - k) / ways * k / (m + n - k)
        for k in range(1, min(m, n) + 1)
    )
    return overlap / (m + n - overlap), chance
