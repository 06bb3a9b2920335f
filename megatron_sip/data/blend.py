"""Which part of a blend sample i comes from: pure arithmetic, no state.

Of the first s samples the first part has floor(s w_1 / W), w its share and W the sum of all; of the
samples left the second part has its share in the same way, and so on. So the parts are spread
evenly, each part's samples come in their own order, after W samples each part has had exactly its
share, and the k-th sample of a part is found by bisection.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHT_SUM = 1 << 16  # samples after which weights hold exactly


@dataclass(frozen=True)
class Blend:
    """The endless order of a blend. Args: counts: samples of each part in a round, none 0."""

    counts: tuple[int, ...]

    def before(self, i: int) -> list[int]:
        """Samples of each part among the first i."""
        found, left, total = [], i, sum(self.counts)
        for count in self.counts:
            found.append(left * count // total)
            left, total = left - found[-1], total - count
        return found

    def locate(self, i: int) -> tuple[int, int]:
        """(part, number of the sample within the part) of sample i >= 0."""
        now, after = self.before(i), self.before(i + 1)
        part = next(c for c, (a, b) in enumerate(zip(now, after, strict=True)) if b > a)
        return part, now[part]

    def index(self, part: int, k: int) -> int:
        """The i with locate(i) == (part, k)."""
        end = (k // self.counts[part] + 1) * sum(self.counts)
        first = bisect.bisect_left(range(end + 1), k + 1, key=lambda s: self.before(s)[part])
        return first - 1


def counts_of_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each part in a round of WEIGHT_SUM, by largest remainders.

    Raises: ValueError if a part would get none.
    """
    total = sum(weights)
    exact = [weight / total * WEIGHT_SUM for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda c: (counts[c] - exact[c], c))
    for part in by_rest[: WEIGHT_SUM - sum(counts)]:
        counts[part] += 1
    for weight, count in zip(weights, counts, strict=True):
        if not count:
            raise ValueError(
                f"data: weight {weight} of {total} in all is less than one sample in "
                f"{WEIGHT_SUM}; raise it, or leave the part out"
            )
    return tuple(counts)


def counts_of_epochs(epochs: Sequence[float], eligible: Sequence[int]) -> tuple[int, ...]:
    """Samples of each part in a round that passes `epochs[c]` times over eligible[c] documents.

    Raises: ValueError if a part would get none.
    """
    counts = tuple(round(e * n) for e, n in zip(epochs, eligible, strict=True))
    for epoch, size, count in zip(epochs, eligible, counts, strict=True):
        if not count:
            raise ValueError(
                f"data: {epoch} epochs of {size} eligible documents are less than one document; "
                "give more, or leave the part out"
            )
    return counts
