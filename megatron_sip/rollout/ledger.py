"""What a receiver of weights accepts: one whole update after the other, and nothing else.

Pure: knows digests and numbers, no tensor, no file, no server. An update has an id that is new each
time, a version, numbered buckets, a digest of each tensor and one of the whole. Whatever does not
fit is refused before it is published, and after a refusal nothing is accepted any more: weights
are half old and half new then, and the server must be restarted.

    start -> accept, verify (each bucket in its turn) -> finish
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import xxhash


class UpdateRefused(ValueError):
    """An update that is torn, replayed, out of order, incomplete or without effect."""


@dataclass(frozen=True)
class Announcement:
    """What the trainer says of one bucket, beside where it lies."""

    update: str
    """Id of the update: a new one each time weights are sent."""
    version: int
    """Policy version."""
    index: int
    """Of this bucket, from 0."""
    count: int
    """Buckets of the update."""
    num_tensors: int
    """Tensors of the update."""
    digests: dict[str, str]
    """Digest of each tensor of this bucket, in the order of the stream."""
    whole: str = ""
    """Digest of the whole update; in the last bucket, "" before it."""
    may_equal: bool = False
    """The policy did not move, so its weights may be those that are held."""


@dataclass
class Whole:
    """Digest of all tensors so far, in the order of the stream."""

    num_tensors: int = 0
    _hash: Any = field(default_factory=xxhash.xxh3_128)

    def add(self, digests: Mapping[str, str]) -> None:
        for name, digest in digests.items():
            self._hash.update(f"{len(name)} {name} {digest}\n".encode())
            self.num_tensors += 1

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Receipt:
    """What a receiver says it loaded, to be compared with what was sent."""

    update: str
    version: int
    whole: str
    num_tensors: int


class UpdateLedger:
    """One receiver's state."""

    def __init__(self) -> None:
        self.version, self.whole = -1, ""  # what is held: of the last finished update
        self.broken = ""  # why nothing is accepted any more
        self._seen: set[str] = set()
        self._open = False
        self._last: Announcement | None = None
        self._found, self._names = Whole(), set[str]()

    def start(self) -> None:
        """A new update begins."""
        if self.broken:
            self.refuse("a new update after one that failed")
        if self._open:
            self.refuse("an update begins while another one is open")
        self._open, self._last = True, None
        self._found, self._names = Whole(), set()

    def accept(self, bucket: Announcement) -> None:
        """Whether it is this bucket's turn; before anything of it is read."""
        last, where = self._last, f"bucket {bucket.index} of {bucket.count} of {bucket.update}"
        if self.broken:
            self.refuse(f"{where} after a failure")
        if not self._open:
            self.refuse(f"{where} outside of an update")
        if last is None:
            self._accept_first(bucket, where)
        elif (bucket.update, bucket.version, bucket.count, bucket.num_tensors) != (
            last.update, last.version, last.count, last.num_tensors
        ):  # fmt: skip
            self.refuse(f"{where} belongs to another update than the buckets before it")
        expected = 0 if last is None else last.index + 1
        if bucket.index != expected or not expected < bucket.count:
            self.refuse(f"{where} is out of turn: number {expected} is due")
        if not bucket.digests or (bucket.whole != "") != (bucket.index == bucket.count - 1):
            self.refuse(f"{where}: the last bucket, and no other, has the digest of the whole")
        if again := self._names & bucket.digests.keys():
            self.refuse(f"{where}: {min(again)} is sent twice in one update")
        self._last = bucket

    def _accept_first(self, bucket: Announcement, where: str) -> None:
        if bucket.update in self._seen:
            self.refuse(f"{where}: this update was sent before")
        if bucket.version < self.version:
            self.refuse(f"{where}: version {bucket.version} is older than {self.version}, the held")
        self._seen.add(bucket.update)

    def verify(self, found: Mapping[str, str]) -> Receipt | None:
        """Compare the accepted bucket's tensors as they were received; before one is loaded.

        Args:    found: digest of each tensor.
        Returns: what the update brought, after its last bucket.
        """
        bucket = self._last
        assert bucket is not None
        if found.keys() != bucket.digests.keys():
            differing = min(found.keys() ^ bucket.digests.keys())
            self.refuse(f"{differing}: the tensors of a bucket are not the announced ones")
        for name, digest in bucket.digests.items():
            if found[name] != digest:
                self.refuse(f"{name}: received bytes differ from those that were sent")
        self._found.add(bucket.digests)
        self._names |= bucket.digests.keys()
        if bucket.index < bucket.count - 1:
            return None
        if self._found.num_tensors != bucket.num_tensors:
            self.refuse(
                f"the update holds {self._found.num_tensors} tensors, {bucket.num_tensors} were "
                "announced"
            )
        if self._found.digest != bucket.whole:
            self.refuse("the update as a whole differs from what was sent")
        if bucket.whole == self.whole and bucket.version > self.version and not bucket.may_equal:
            self.refuse(
                f"version {bucket.version} brings the bytes of version {self.version}, though the "
                "policy has moved: the trainer exported stale weights"
            )
        return Receipt(bucket.update, bucket.version, bucket.whole, bucket.num_tensors)

    def finish(self) -> None:
        """The update may be published: all of it was verified."""
        last = self._last
        if self.broken:
            self.refuse("the end of an update that failed")
        if not self._open or last is None or last.index < last.count - 1:
            index = -1 if last is None else last.index
            count = "?" if last is None else last.count
            self.refuse(f"an update ends after {index + 1} of {count} buckets")
        assert last is not None
        self.version, self.whole, self._open = last.version, last.whole, False

    def refuse(self, reason: str) -> NoReturn:
        """Nothing is accepted from here on."""
        self.broken = self.broken or reason
        why = reason if self.broken == reason else f"{reason}: {self.broken}"
        raise UpdateRefused(f"{why}; restart the server")
