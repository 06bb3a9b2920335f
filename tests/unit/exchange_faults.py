"""Faults of a weight exchange by seeds: what a wire, a disk or a bug may do. Not a test.

A fault acts on the calls between sender and server, or on the file that a call names.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.rollout.bucket_file import PADDING

Deliver = Callable[[dict[str, Any]], None]


@dataclass
class Call:
    """One /update_weights on its way."""

    info: dict[str, Any]
    root: Path
    deliver: Deliver
    last: list[tuple[dict[str, Any], bytes]]  # announcements and files of the update before

    @property
    def bucket(self) -> dict[str, Any]:
        return self.info["bucket"]

    @property
    def file(self) -> Path:
        return self.root / self.info["file"]

    def edit(self, change: Callable[[bytearray], None]) -> None:
        """Change the bytes of the file, in place, as shared memory is."""
        with self.file.open("r+b") as file:
            content = bytearray(file.read())
            change(content)
            file.seek(0)
            file.write(content)


def _tensors(content: bytearray) -> list[tuple[int, int]]:
    """First byte of each tensor, and the one after its last."""
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(bytes(content[8:start]))
    return [
        (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in entries.items()
        if name != PADDING
    ]


def _flip(content: bytearray, rng: random.Random, begin: int, end: int) -> None:
    content[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)


def flipped_bit(call: Call, rng: random.Random) -> None:
    def change(content: bytearray) -> None:
        begin, end = rng.choice(_tensors(content))
        _flip(content, rng, begin, end)

    call.edit(change)
    call.deliver(call.info)


def flipped_bit_in_the_header(call: Call, rng: random.Random) -> None:
    call.edit(lambda c: _flip(c, rng, 9, c.index(f'"{PADDING}"'.encode())))
    call.deliver(call.info)


def torn_file(call: Call, rng: random.Random) -> None:
    """Its last bytes were never written."""

    def change(content: bytearray) -> None:
        end = max(end for _, end in _tensors(content))
        cut = rng.randrange(min(begin for begin, _ in _tensors(content)), end)
        content[cut:end] = bytes(byte ^ 0xFF for byte in content[cut:end])

    call.edit(change)
    call.deliver(call.info)


def exchanged_digest(call: Call, rng: random.Random) -> None:
    name = rng.choice(sorted(call.bucket["digests"]))
    digest = call.bucket["digests"][name]
    place = rng.randrange(len(digest))
    other = rng.choice([c for c in "0123456789abcdef" if c != digest[place]])
    call.bucket["digests"][name] = digest[:place] + other + digest[place + 1 :]
    call.deliver(call.info)


def missing_bucket(call: Call, rng: random.Random) -> None:
    pass


def repeated_bucket(call: Call, rng: random.Random) -> None:
    call.deliver(call.info)
    call.deliver(call.info)


def early_bucket(call: Call, rng: random.Random) -> None:
    """It comes with the number of a later one."""
    call.bucket["index"] += rng.randrange(1, 3)
    call.deliver(call.info)


def old_version(call: Call, rng: random.Random) -> None:
    call.bucket["version"] = rng.randrange(call.bucket["version"] - 1)
    call.deliver(call.info)


def replayed_bucket(call: Call, rng: random.Random) -> None:
    """What was sent in this turn of the update before, as it was."""
    info, content = call.last[call.bucket["index"]]
    call.file.write_bytes(content)
    call.deliver(copy.deepcopy(info))


def stale_bucket(call: Call, rng: random.Random) -> None:
    """The bytes and digests of the update before, under the new one's name."""
    info, content = call.last[call.bucket["index"]]
    call.file.write_bytes(content)
    call.bucket["digests"] = dict(info["bucket"]["digests"])
    call.deliver(call.info)


def wrong_number(call: Call, rng: random.Random) -> None:
    key = rng.choice(["count", "num_tensors"])
    call.bucket[key] += rng.choice([-1, 1])
    call.deliver(call.info)


def other_update(call: Call, rng: random.Random) -> None:
    call.bucket["update"] = "0" * 16
    call.deliver(call.info)


def lost_tensor(call: Call, rng: random.Random) -> None:
    """Neither announced nor missed."""
    call.bucket["digests"].pop(rng.choice(sorted(call.bucket["digests"])))
    call.deliver(call.info)


def no_file(call: Call, rng: random.Random) -> None:
    call.info["file"] = "slot_7.safetensors"
    call.deliver(call.info)


ON_ONE_BUCKET = (
    flipped_bit, flipped_bit_in_the_header, torn_file, exchanged_digest, missing_bucket,
    repeated_bucket, early_bucket, old_version, replayed_bucket, stale_bucket, wrong_number,
    other_update, lost_tensor, no_file,
)  # fmt: skip
ON_THE_UPDATE = ("half update", "half update, then a whole one", "no-op", "idle", "lost finish")
FAULTS = (*(fault.__name__ for fault in ON_ONE_BUCKET), *ON_THE_UPDATE)
