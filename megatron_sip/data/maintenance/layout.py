"""Where the documents of a `.bin` lie, as its `.idx` says, and whether that can be true.

The arrays of the index stay memory-mapped; a check holds one chunk of them. A document may have
several sequences, as Megatron's sentence splitting makes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sip.data.indexed_dataset import IndexArrays
from megatron_sip.data.indexed_files import HEADER, MAGIC, IndexHeader, read_header

CHUNK = 1 << 20  # entries of an array; a multiple of 8
_MAX_TOKENS = 2**31 - 1  # of a document: the provenance counts them in int32
_REFUSED = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "float64", 7: "float32"}


@dataclass(frozen=True)
class Problem:
    """What is wrong with one document. Args: document: its number. text: follows its name."""

    document: int
    text: str


@dataclass(frozen=True)
class Layout:
    """A mapped index. Args: path: of the `.idx`. header, index: its content."""

    path: Path
    header: IndexHeader
    index: IndexArrays

    @property
    def documents(self) -> int:
        """How many there are."""
        return self.header.documents

    @property
    def itemsize(self) -> int:
        """Bytes a token."""
        return self.header.dtype.itemsize

    @property
    def end(self) -> int:
        """Bytes that `.bin` must have."""
        return int(self.spans(self.documents - 1, self.documents)[1][0]) if self.documents else 0

    def spans(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Byte ranges of the documents first : last, of which each has a sequence.

        Returns: (starts, ends), int64[last - first] each.
        """
        borders = np.array(self.index.borders[first : last + 1])
        tails = borders[1:] - 1
        ends = self.index.pointers[tails] + self.index.lengths[tails].astype(np.int64) * (
            self.itemsize
        )
        return self.index.pointers[borders[:-1]], ends

    def lengths(self, first: int, last: int) -> np.ndarray:
        """int64[last - first]: tokens of these documents."""
        starts, ends = self.spans(first, last)
        return (ends - starts) // self.itemsize

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, last) of runs of at most CHUNK documents, together all of them."""
        for first in range(0, self.documents, CHUNK):
            yield first, min(first + CHUNK, self.documents)


def open_layout(path: Path) -> Layout:
    """Map a `.idx` whose header agrees with its size; `first_problem` checks the rest.

    Raises: ValueError if it is missing, no Megatron index, of a type that is not read, truncated.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(HEADER.size)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give the prefix of PREFIX.idx"
        ) from None
    code = HEADER.unpack(start)[2] if len(start) == HEADER.size else 0
    if start.startswith(MAGIC) and code in _REFUSED:
        raise ValueError(
            f"{path} says that its token ids are {_REFUSED[code]} (type code {code}), but only "
            "int32 (4) and uint16 (8) are read; make the dataset again with one of these"
        )
    header = read_header(path)
    return Layout(path, header, IndexArrays(path, header))


def first_problem(layout: Layout) -> Problem | None:
    """The first document of which the index cannot be true.

    Borders must ascend from 0 to the number of sequences, lengths be 0 or more, pointers the
    running sums of lengths; each document needs a token and has fewer than 2^31.
    """
    problem = _border_problem(layout)
    good = problem.document if problem else layout.documents
    in_sequences = _sequence_problem(layout, good)
    if in_sequences is not None:
        problem, good = in_sequences, in_sequences.document
    return _length_problem(layout, good) or problem


def eligible_bits(layout: Layout, *, shortest: int) -> np.ndarray:
    """uint8[ceil(documents / 8)]: bit i % 8 of byte i // 8 says that document i has `shortest`
    tokens or more, its end-of-document id included."""
    parts = [
        np.packbits(layout.lengths(first, last) >= shortest, bitorder="little")
        for first, last in layout.chunks()
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _border_problem(layout: Layout) -> Problem | None:
    borders, sequences = layout.index.borders, layout.header.sequences
    if borders[0] != 0:
        return Problem(0, f"begins at sequence {borders[0]}, but must begin at 0")
    for first, last in layout.chunks():
        part = np.array(borders[first : last + 1])
        bad = np.flatnonzero((part[1:] <= part[:-1]) | (part[1:] > sequences))
        if bad.size:
            start, end = part[bad[0] : bad[0] + 2]
            text = (
                f"is empty: it has no sequence (its borders are {start} and {end})"
                if start == end
                else f"has the borders {start} and {end}, which must ascend and not pass the "
                f"{sequences} sequences"
            )
            return Problem(first + int(bad[0]), text)
    if borders[layout.documents] != sequences:
        found = int(borders[layout.documents])
        return Problem(
            max(0, layout.documents - 1),
            f"is the last and ends at sequence {found}, but there are {sequences} sequences",
        )
    return None


def _sequence_problem(layout: Layout, documents: int) -> Problem | None:
    """The first wrong sequence of the first documents, whose borders are right."""
    index, end = layout.index, 0
    limit = int(index.borders[documents]) if documents else 0
    for first in range(0, limit, CHUNK):
        last = min(first + CHUNK, limit)
        lengths = index.lengths[first:last].astype(np.int64)
        ends = end + np.cumsum(lengths) * layout.itemsize
        starts = ends - lengths * layout.itemsize
        bad = np.flatnonzero((lengths < 0) | (index.pointers[first:last] != starts))
        if bad.size:
            at, sequence = int(bad[0]), first + int(bad[0])
            text = (
                f"has sequence {sequence} of {lengths[at]} tokens"
                if lengths[at] < 0
                else f"has sequence {sequence} at byte {index.pointers[sequence]}, but the "
                f"lengths of those before it end at byte {starts[at]}"
            )
            return Problem(bisect_right(index.borders, sequence, 0, documents + 1) - 1, text)
        end = int(ends[-1])
    return None


def _length_problem(layout: Layout, documents: int) -> Problem | None:
    """The first of these documents without a token, or with too many."""
    for first in range(0, documents, CHUNK):
        lengths = layout.lengths(first, min(first + CHUNK, documents))
        bad = np.flatnonzero((lengths < 1) | (lengths > _MAX_TOKENS))
        if bad.size:
            length = int(lengths[bad[0]])
            text = f"has {length} tokens, more than {_MAX_TOKENS}"
            return Problem(first + int(bad[0]), text if length else "is empty: it has no token")
    return None
