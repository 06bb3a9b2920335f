"""The tokens of a `.bin`, whole documents at a time in pieces of a few megabytes.

Memory holds one piece: READ_BYTES, or one document if that is longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_sip.data.maintenance.layout import Layout, Problem
from megatron_sip.data.provenance import ROW_GROUP
from megatron_sip.data.storage import LocalBytes

READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Piece:
    """Documents that lie together.

    Args: first: number of the first. start: byte in `.bin` where it begins. lengths: int64[n],
          tokens of each. tokens: dtype[T], all of them one after another.
    """

    first: int
    start: int
    lengths: np.ndarray
    tokens: np.ndarray

    @property
    def end(self) -> int:
        """Byte in `.bin` where the last document ends."""
        return self.start + self.tokens.nbytes

    @property
    def last_tokens(self) -> np.ndarray:
        """dtype[n]: the last token of each document."""
        return self.tokens[np.cumsum(self.lengths) - 1]


def read_pieces(layout: Layout, data: LocalBytes, *, first: int, last: int) -> Iterator[Piece]:
    """The documents first : last in order.

    Args:   layout: without a problem. data: the `.bin`.
    Raises: ValueError if the file ends before they do.
    """
    while first < last:
        starts, ends = layout.spans(first, min(first + ROW_GROUP, last))
        start = int(starts[0])
        count = max(1, int(np.searchsorted(ends, start + READ_BYTES, side="right")))
        end = int(ends[count - 1])
        found = data.read(start, end - start)
        if len(found) != end - start:
            raise ValueError(
                f"{data.name}: {len(found)} of {end - start} bytes could be read at byte {start}, "
                f"where document {first} begins; the file was truncated; restore it or make the "
                "dataset again"
            )
        lengths = (ends[:count] - starts[:count]) // layout.itemsize
        yield Piece(first, start, lengths, np.frombuffer(found, layout.header.dtype))
        first += count


def id_problem(piece: Piece, *, vocab_size: int) -> Problem | None:
    """The first document with a token id outside [0, vocab_size)."""
    tokens = piece.tokens
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return None
    at = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    document = int(np.searchsorted(np.cumsum(piece.lengths), at, side="right"))
    text = (
        f"has token id {tokens[at]} at byte {piece.start + at * tokens.itemsize}, but ids must "
        f"lie in [0, {vocab_size})"
    )
    return Problem(piece.first + document, text)
