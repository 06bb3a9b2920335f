"""Buckets of tensors as safetensors files of a fixed size in shared memory, written in place.

The writer maps a file once and copies tensors straight into it, again and again: new pages cost
several times what a copy costs. Each file holds a tensor more, `padding`, which fills it to its
end. The reader maps it anew for each bucket and copies nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PADDING = "padding"
ALIGNMENT = 64
NUM_SLOTS = 2


def shared_memory() -> Path:
    """Where files are memory; on a system without, the folder of temporary files."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() else Path(tempfile.gettempdir())


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte of the file

    @property
    def end(self) -> int:
        return self.begin + self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """One bucket: its tensors in the order of the stream, and the header of its file."""

    places: tuple[Place, ...]
    header: bytes

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(place.end - place.begin for place in self.places)


Described = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor's name, dtype and shape."""


def grouped(tensors: Iterable[Described], limit_bytes: int) -> Iterator[list[Described]]:
    """The stream in buckets of at most `limit_bytes`; a larger tensor stands alone."""
    group: list[Described] = []
    size = 0
    for tensor in tensors:
        needed = num_bytes([tensor])
        if group and size + needed > limit_bytes:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += needed
    if group:
        yield group


def num_bytes(tensors: Iterable[Described]) -> int:
    """Of all their elements."""
    return sum(dtype.itemsize * prod(shape) for _, dtype, shape in tensors)


def plan_buckets(tensors: Iterable[Described], limit_bytes: int) -> tuple[tuple[Layout, ...], int]:
    """Lay out a stream in files.

    Returns: the buckets, and the size of a file that holds any of them.
    """
    groups = list(grouped(tensors, limit_bytes))
    lengths = [num_bytes(group) for group in groups]
    head = max((len(_header(group, 0, 2**62)) for group in groups), default=8)
    start = -(-head // ALIGNMENT) * ALIGNMENT
    file_size = start + max(lengths, default=0)
    return tuple(_layout(group, start, file_size) for group in groups), file_size


def _header(group: Sequence[Described], length: int, file_size: int) -> bytes:
    """Header of a safetensors file with these tensors and the padding.

    Args: length: bytes that it shall have; 0: what it needs.
    """
    entries, at = {}, 0
    for name, dtype, shape in _by_size(group):
        end = at + dtype.itemsize * prod(shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    total = file_size - length
    entries[PADDING] = {"dtype": "U8", "shape": [total - at], "data_offsets": [at, total]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(length - 8 if length else len(text))
    return len(text).to_bytes(8, "little") + text


def _by_size(
    group: Sequence[Described],
) -> list[Described]:
    """Large elements first, so that all are aligned."""
    return sorted(group, key=lambda tensor: -tensor[1].itemsize)


def _layout(group: Sequence[Described], start: int, file_size: int) -> Layout:
    places, at = {}, start
    for name, dtype, shape in _by_size(group):
        places[name] = Place(name, dtype, shape, at)
        at = places[name].end
    ordered = tuple(places[name] for name, _, _ in group)
    return Layout(ordered, _header(group, start, file_size))


class Slot:
    """A file in shared memory that this process writes bucket after bucket into."""

    def __init__(self, path: Path, size: int) -> None:
        """Raises: OSError if the folder has no room: a page that is missing later would kill us."""
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._bytes: torch.Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)

    def begin(self, layout: Layout) -> None:
        """The next bucket; what the file held is no longer a bucket."""
        self._map[: len(layout.header)] = layout.header

    def write(self, place: Place, tensor: torch.Tensor) -> None:
        """Copy one tensor to its place."""
        assert self._bytes is not None
        target = self._bytes[place.begin : place.end].view(place.dtype).view(place.shape)
        target.copy_(tensor)

    def content(self, place: Place) -> memoryview:
        """Bytes of one tensor."""
        assert self._bytes is not None
        return self._bytes[place.begin : place.end].numpy().data

    def close(self) -> None:
        """Unmap and delete."""
        self._bytes = None
        self._map.close()
        self.path.unlink(missing_ok=True)


class MappedBucket:
    """A bucket as its reader sees it: tensors that lie in the file, not in memory of their own.

    Raises: ValueError if the file is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(self._map[:8], "little")
        if not 0 < length <= len(self._map) - 8:
            raise ValueError(f"{path.name}: it has no header of safetensors")
        try:
            header = json.loads(self._map[8 : 8 + length])
            entries = {n: (DTYPES[e["dtype"]], e["shape"], e["data_offsets"])
                       for n, e in header.items() if n != PADDING}  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name}: its header is not one of safetensors") from error
        self._start, self._entries, self._file = 8 + length, entries, path.name
        self._alive: list[weakref.ref[np.ndarray]] = []

    def names(self) -> set[str]:
        return set(self._entries)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the file; writing to one changes no file.

        Raises: ValueError if one lies outside of it, or its size contradicts its shape.
        """
        for name in self._entries:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        """One of them."""
        dtype, shape, (begin, end) = self._entries[name]
        if not 0 <= begin <= end <= len(self._map) - self._start:
            raise ValueError(f"{self._file}: {name} lies outside of the file")
        if end - begin != dtype.itemsize * prod(shape):
            raise ValueError(f"{self._file}: {name} has {end - begin} bytes for shape {shape}")
        data = np.frombuffer(self._map, np.uint8, end - begin, self._start + begin)
        if len(data):
            self._alive.append(weakref.ref(data))
        return torch.from_numpy(data).view(dtype).view(shape)

    def keep(self) -> int:
        """Give what is still used of the tensors pages of its own, before the file is rewritten.

        vLLM holds the tensors of a layer until all of it are there, which may be buckets later.

        Returns: bytes that are still used.
        """
        kept = 0
        for reference in self._alive:
            data = reference()
            if data is not None:
                data[:: mmap.PAGESIZE] += np.uint8(0)  # a written page of the mapping is a copy
                data[-1:] += np.uint8(0)
                kept += len(data)
        return kept
