"""Which split a document belongs to: a function of its text alone.

The hash of a document's bytes decides, so that the split is stable when documents are added,
removed or reordered, exact duplicates never straddle two splits, and nothing is held in memory.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

DEFAULT_SALT = "megatron_sip-1"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Split:
    """Names and integer shares, in the order given; shares are relative to their sum."""

    names: tuple[str, ...]
    shares: tuple[int, ...]
    salt: str = DEFAULT_SALT

    def __str__(self) -> str:
        return ",".join(f"{n}={s}" for n, s in zip(self.names, self.shares, strict=True))


def parse_split(text: str, *, salt: str = DEFAULT_SALT) -> Split:
    """Read `train=80,validation=10,test=10`.

    Args:    text: comma-separated NAME=SHARE; SHARE is a positive integer.
             salt: string mixed into the hash; another salt gives another split.
    Returns: Split with the names in the order given.
    Raises:  ValueError if an item has another form or a name comes twice.
    """
    names: list[str] = []
    shares: list[int] = []
    for item in text.split(","):
        name, _, share = item.strip().partition("=")
        valid = _NAME.fullmatch(name) and share.isascii() and share.isdigit() and int(share) > 0
        if not valid:
            raise ValueError(
                f"--split item {item!r} must be NAME=SHARE with a positive whole share; "
                "for example train=80,validation=10,test=10"
            )
        if name in names:
            raise ValueError(f"--split {text!r} names {name!r} twice; use each name once")
        names.append(name)
        shares.append(int(share))
    return Split(names=tuple(names), shares=tuple(shares), salt=salt)


def split_of(text: str, split: Split) -> str:
    """Name of the split that a document with this text belongs to.

    Args:    text: the whole document; only its UTF-8 bytes and the salt count.
    Returns: one of `split.names`, with a probability of share / sum of shares.
    """
    key = hashlib.blake2b(split.salt.encode(), digest_size=32).digest()
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    point = int.from_bytes(digest, "little") * sum(split.shares) >> 64
    for name, share in zip(split.names, split.shares, strict=True):
        if point < share:
            return name
        point -= share
    raise AssertionError("unreachable: point < sum of shares")
