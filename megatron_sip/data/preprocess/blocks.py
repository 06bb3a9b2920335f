"""Input files as a stream of blocks of records: what a worker gets, in order, with where it ends.

Only whole records are in a block. Memory holds one block, whatever a file claims: a record longer
than the limit is passed over and reported, and compressed data that grows more than text can is
refused.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator, Sequence

import pyarrow as pa

from megatron_sip.data.preprocess.inputs import InputFile
from megatron_sip.data.preprocess.records import Block, Cursor
from megatron_sip.data.preprocess.streams import TextStream, open_text

BLOCK_BYTES = 1 << 20
_DAMAGE = (
    EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowException, UnicodeError, IndexError,
    OverflowError, MemoryError,
)  # fmt: skip


def read_blocks(
    files: Sequence[InputFile],
    *,
    columns: Sequence[str],
    max_record_bytes: int,
    start: Cursor,
) -> Iterator[Block]:
    """Every record from `start` on, in the order of the files.

    Args:   columns: keys that are read of a table; dots go deeper. max_record_bytes: of one record.
    Raises: ValueError naming the file if it is damaged, truncated, lacks a column, or expands more
            than text can.
    """
    for source in range(start.source, len(files)):
        file = files[source]
        cursor = start if source == start.source else Cursor(source)
        read = _lines if file.kind == "jsonl" else _text if file.kind == "txt" else _rows
        try:
            yield from read(file, cursor, columns, max_record_bytes)
        except _DAMAGE as error:
            raise ValueError(
                f"{file.url}: damaged or truncated {(file.compression or '.' + file.kind)[1:]} "
                f"data ({error or type(error).__name__}); fetch the file again or remove it"
            ) from None


def _lines(file: InputFile, at: Cursor, _: Sequence[str], limit: int) -> Iterator[Block]:
    """Blocks of whole lines."""
    with open_text(file) as stream:
        stream.skip(at.offset, step=BLOCK_BYTES)
        for rows, passed in _whole_lines(stream, limit):
            records = rows.count(b"\n") + (not rows.endswith(b"\n")) if rows else 1
            end = Cursor(at.source, at.offset + len(rows) + passed, at.record + records)
            yield Block(at, end, rows, passed, stream.input_bytes(), is_json=True)
            at = end


def _whole_lines(stream: TextStream, limit: int) -> Iterator[tuple[bytes, int]]:
    """(whole lines, 0), or (b"", bytes of one line over the limit); lines keep their order."""
    rest = b""
    while piece := stream.read(BLOCK_BYTES):
        data = rest + piece
        cut = data.rfind(b"\n") + 1
        if cut:
            yield data[:cut], 0
        rest = data[cut:]
        if len(rest) > limit:
            passed, rest = len(rest), b""
            while piece := stream.read(BLOCK_BYTES):
                cut = piece.find(b"\n") + 1
                passed += cut or len(piece)
                if cut:
                    rest = piece[cut:]
                    break
            yield b"", passed
    if rest:
        yield rest, 0


def _text(file: InputFile, at: Cursor, _: Sequence[str], limit: int) -> Iterator[Block]:
    """One block: the whole file."""
    if at.record:
        return
    with open_text(file) as stream:
        parts, size = [], 0
        while piece := stream.read(BLOCK_BYTES):
            size += len(piece)
            parts = [*parts, piece] if size <= limit else []
        passed = size if size > limit else 0
        end = Cursor(at.source, size, 1)
        yield Block(at, end, b"".join(parts), passed, stream.input_bytes())


def _rows(file: InputFile, at: Cursor, columns: Sequence[str], _: int) -> Iterator[Block]:
    """Blocks of rows of a Parquet or Arrow file."""
    from megatron_sip.data.preprocess.tables import table_rows  # loads much that text needs not

    pieces = table_rows(file, columns, first=at.offset, piece_bytes=BLOCK_BYTES)
    for rows, share in pieces:
        end = Cursor(at.source, at.offset + len(rows), at.record + len(rows))
        yield Block(at, end, rows, 0, int(share * file.bytes))
        at = end
