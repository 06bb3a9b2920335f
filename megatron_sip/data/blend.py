"""Which part of a blend sample i comes from: pure arithmetic, no state.

Samples come in blocks; in each, part c has counts[c] places, in an order that a keyed permutation
gives. So the k-th sample of a part and the sample of the blend are functions of each other.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_sip.data.permutation import permute, unpermute

WEIGHT_BLOCK = 1 << 16  # samples over which weights hold exactly


@dataclass(frozen=True)
class Blend:
    """The endless order of a blend.

    Args: counts: samples of each part in a block, none 0. seed: of the order.
    """

    counts: tuple[int, ...]
    seed: int

    @property
    def block(self) -> int:
        """Samples of one block."""
        return sum(self.counts)

    def locate(self, i: int) -> tuple[int, int]:
        """(part, number of the sample within the part) of sample i >= 0."""
        if len(self.counts) == 1:
            return 0, i
        number, position = divmod(i, self.block)
        place = permute(position, size=self.block, key=self._key(number))
        starts = self._starts()
        part = bisect.bisect_right(starts, place) - 1
        return part, number * self.counts[part] + place - starts[part]

    def index(self, part: int, k: int) -> int:
        """The i with locate(i) == (part, k)."""
        if len(self.counts) == 1:
            return k
        number, inside = divmod(k, self.counts[part])
        place = self._starts()[part] + inside
        return number * self.block + unpermute(place, size=self.block, key=self._key(number))

    def _starts(self) -> list[int]:
        return [0, *accumulate(self.counts[:-1])]

    def _key(self, number: int) -> int:
        digest = hashlib.blake2b(f"blend {self.seed} {number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def counts_of_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each part in a block of WEIGHT_BLOCK, by largest remainders.

    Raises: ValueError if a part would get none.
    """
    total = sum(weights)
    exact = [weight / total * WEIGHT_BLOCK for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda c: (counts[c] - exact[c], c))
    for part in by_rest[: WEIGHT_BLOCK - sum(counts)]:
        counts[part] += 1
    for weight, count in zip(weights, counts, strict=True):
        if not count:
            raise ValueError(
                f"data: weight {weight} of {total} in all is less than one sample in "
                f"{WEIGHT_BLOCK}; raise it, or leave the part out"
            )
    return tuple(counts)


def counts_of_epochs(epochs: Sequence[float], eligible: Sequence[int]) -> tuple[int, ...]:
    """Samples of each part in a block that passes `epochs[c]` times over eligible[c] documents.

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
