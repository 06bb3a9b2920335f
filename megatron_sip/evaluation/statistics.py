"""Numbers of an evaluation and how sure they are. Pure; prefixes are the units of sampling."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def _finite_or_infinite(values: ArrayLike, *, name: str) -> np.ndarray:
    """float64[n] without NaN, n > 0."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; give a non-empty list of numbers")
    if missing := int(np.isnan(array).sum()):
        raise ValueError(f"{name} holds {missing} NaN; drop those prefixes and report their number")
    return array


def wins(candidate_scores: ArrayLike, baseline_scores: ArrayLike) -> np.ndarray:
    """1 where the candidate scores higher than the baseline, 0 where lower, 1/2 for a tie.

    Args:    candidate_scores, baseline_scores: float[n] of the same n prefixes.
    Returns: float64[n], no unit; what `bootstrap_interval` resamples.
    Raises:  ValueError on NaN, unequal lengths or no prefix at all.
    """
    candidate = _finite_or_infinite(candidate_scores, name="candidate_scores")
    baseline = _finite_or_infinite(baseline_scores, name="baseline_scores")
    if candidate.shape != baseline.shape:
        raise ValueError(
            f"candidate_scores has {candidate.size} prefixes, baseline_scores {baseline.size}; "
            "score the same prefixes"
        )
    return (candidate > baseline) + 0.5 * (candidate == baseline)


def bootstrap_interval(
    values: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Prefixes of one document are alike, so with `groups` whole documents are drawn with
    replacement, and the mean runs over all prefixes of the documents drawn (cluster bootstrap).

    Args:    values: float[n], one a prefix.
             groups: length n, the document of each prefix; None: every prefix is its own.
             resamples: number of draws; level: coverage in (0, 1).
    Returns: (low, high) in the unit of `values`.
    Raises:  ValueError on NaN, fewer than 2 documents, unequal lengths, or a bad setting.
    Source:  Efron and Tibshirani 1993, chapter 13.
    """
    array = _finite_or_infinite(values, name="values")
    owners = range(array.size) if groups is None else groups
    if len(owners) != array.size:
        raise ValueError(f"groups has length {len(owners)}, values {array.size}; give one a value")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples is {resamples}, level {level}; need >= 1 and within (0, 1)")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(owner, len(numbers)) for owner in owners])
    if len(numbers) < 2:
        raise ValueError("values come from 1 document, whose spread is unknown; take at least 2")
    sums = np.bincount(index, weights=array)
    counts = np.bincount(index)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one draw at a time: memory does not grow with resamples
        drawn = generator.integers(len(numbers), size=len(numbers))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def distinct_n(token_lists: Sequence[Sequence[int] | np.ndarray], n: int) -> float:
    """Distinct n-grams over all n-grams of a set of candidates; n-grams end with the candidate.

    Args:    token_lists: token ids of each candidate.
    Returns: fraction in (0, 1]; it falls with the number of candidates, so compare equal sets.
    Raises:  ValueError if n < 1 or if no candidate has n tokens.
    Source:  Li et al. 2016, arXiv 1510.03055.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    grams = [
        tuple(tokens[i : i + n])
        for tokens in ([int(token) for token in candidate] for candidate in token_lists)
        for i in range(len(tokens) - n + 1)
    ]
    if not grams:
        raise ValueError(f"none of {len(token_lists)} candidates has n = {n} tokens; lower n")
    return len(set(grams)) / len(grams)


def distinct_n_by_sets(
    token_lists: Sequence[Sequence[int] | np.ndarray], n: int, *, set_size: int
) -> float:
    """Mean of `distinct_n` over consecutive sets of `set_size` candidates (all, if fewer).

    distinct-n falls with the number of tokens it is taken over; sets of one size make figures of
    different evaluations comparable. A last, incomplete set is left out.
    """
    num_sets = max(1, len(token_lists) // set_size)
    sets = [token_lists[i * set_size : (i + 1) * set_size] for i in range(num_sets)]
    return float(np.mean([distinct_n(part, n) for part in sets]))


def mean_length(token_lists: Sequence[Sequence[int] | np.ndarray]) -> float:
    """Mean number of tokens of a candidate, end-of-text included.

    Raises: ValueError if there is none.
    """
    if not token_lists:
        raise ValueError("token_lists is empty; a mean length needs at least 1 candidate")
    return sum(len(tokens) for tokens in token_lists) / len(token_lists)
