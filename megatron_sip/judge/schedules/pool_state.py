"""What a schedule knows of one pool and one criterion. Pure.

A pair is (low, high), indices of candidates. A presentation is (first, second): the same pair in
the order in which the judge sees it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Pair = tuple[int, int]
Presentation = tuple[int, int]


@dataclass(frozen=True)
class PoolState:
    """One pool under one pairwise criterion."""

    num_candidates: int
    seed: int
    criterion: str
    pivot: int | None  # index in the pool; None: one is drawn
    table: np.ndarray  # float64[C, C] of pair_table
    asked: Mapping[Pair, int]  # pairs with a verdict, even a missing one -> who was first
    settled: frozenset[Pair]  # pairs all of whose questions have a verdict, even a missing one

    def draw(self, *parts: int | str) -> int:
        """A number in [0, 2^64) by seed, criterion and parts."""
        return hashed(self.seed, self.criterion, *parts)

    def seated(self) -> list[int]:
        """All candidates in an order drawn by seed."""
        return sorted(range(self.num_candidates), key=lambda c: self.draw(c))


def hashed(*parts: int | str) -> int:
    """A number in [0, 2^64), the same on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def pair_of(one: int, other: int) -> Pair:
    return (one, other) if one < other else (other, one)


def balanced(
    pairs: Iterable[Pair], before: Iterable[Presentation], state: PoolState
) -> list[Presentation]:
    """Pairs in an order of presentation that evens out who was first.

    First is the one that has been first less often than second in `before` and in the pairs that
    come earlier; a seeded bit decides between equals. What was asked before keeps its order.
    """
    lead: Counter[int] = Counter()
    for first, second in before:
        lead[first] += 1
        lead[second] -= 1
    shown = []
    for low, high in pairs:
        if (low, high) in state.asked:
            first = state.asked[low, high]
        elif lead[low] != lead[high]:
            first = low if lead[low] < lead[high] else high
        else:
            first = low if state.draw("first", low, high) & 1 else high
        second = low + high - first
        lead[first] += 1
        lead[second] -= 1
        shown.append((first, second))
    return shown
