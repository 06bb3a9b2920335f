"""Keyed bijection of [0, size): a shuffled order of any length that takes no memory.

A balanced Feistel network permutes [0, 2^b) for the smallest even b that covers `size`; values
outside [0, size) walk the cycle until they come back. Rounds are hashes with fixed constants,
so the order is the same on every machine and for every library version.

Source: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (cycle walking);
Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", 2014 (splitmix64).
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 8


def _mix(value: int) -> int:
    """splitmix64's step and finaliser: 64 bits to 64 bits, a bijection."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permute(index: int, *, size: int, key: int) -> int:
    """Image of `index` under the permutation of [0, size) that `key` names.

    Args:    index: 0 <= index < size.
             size:  number of elements, at most 2^62.
             key:   64 bits; two keys give unrelated permutations.
    Returns: int in [0, size); distinct for distinct `index`. Less than 4 network passes on
             average (the network's domain is below 4 x size), O(1) memory.
    Raises:  ValueError if `index` or `size` is out of range.
    """
    half, round_keys = _network(index, size, key)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for round_key in round_keys:
            # The high bits of a product mix best, and half <= 31.
            left, right = right, left ^ (_mix(right ^ round_key) >> (64 - half))
        value = left << half | right
        if value < size:
            return value


def unpermute(image: int, *, size: int, key: int) -> int:
    """The `index` with permute(index, size=size, key=key) == image.

    Raises: ValueError if `image` or `size` is out of range.
    """
    half, round_keys = _network(image, size, key)
    mask = (1 << half) - 1
    value = image
    while True:
        left, right = value >> half, value & mask
        for round_key in reversed(round_keys):
            left, right = right ^ (_mix(left ^ round_key) >> (64 - half)), left
        value = left << half | right
        if value < size:
            return value


def _network(value: int, size: int, key: int) -> tuple[int, list[int]]:
    """(bits of half a value, round keys)."""
    if not 0 <= value < size <= 1 << 62:
        raise ValueError(
            f"permutation: {value} of size {size} must satisfy 0 <= value < size <= 2^62"
        )
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    return half, [_mix(_mix(key & _MASK) ^ r) for r in range(_ROUNDS)]
