"""Input files as a stream of blocks of records: what a worker gets, in order, with where it ends.

Only whole records are in a block. Memory holds one block, whatever a file claims: a record longer
than the limit is passed over and reported, and compressed data that grows more than text can is
refused.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sip.data.preprocess.inputs import InputFile

BLOCK_BYTES = 1 << 20
_MAX_EXPANSION = 250  # decompressed by compressed; text reaches 10 to 30
_FREE_EXPANSION = 1 << 26  # bytes that any file may have
_DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowException)


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on.

    Args: source: index of the file. offset: bytes of text (after decompression) or rows read of
          it. record: records read of it, lines for .jsonl.
    """

    source: int = 0
    offset: int = 0
    record: int = 0


@dataclass(frozen=True)
class Block:
    """Some records of one file, one after another.

    Args: cursor: where the first begins. end: where the next block begins. rows: lines of JSON,
          the bytes of one text file, or columns of a table. passed_over: bytes of a record over the
          limit, which is the only one of its block and not in `rows`; 0: none. input_bytes: of the
          file, read for this block. is_json: `rows` are lines of JSON.
    """

    cursor: Cursor
    end: Cursor
    rows: bytes | pa.RecordBatch
    passed_over: int
    input_bytes: int
    is_json: bool = False


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
    with _open(file) as stream:
        stream.skip(at.offset)
        for rows, passed in _whole_lines(stream, limit):
            records = rows.count(b"\n") + (not rows.endswith(b"\n")) if rows else 1
            end = Cursor(at.source, at.offset + len(rows) + passed, at.record + records)
            yield Block(at, end, rows, passed, stream.input_bytes(), is_json=True)
            at = end


def _whole_lines(stream: _Guarded, limit: int) -> Iterator[tuple[bytes, int]]:
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
    with _open(file) as stream:
        parts, size = [], 0
        while piece := stream.read(BLOCK_BYTES):
            size += len(piece)
            parts = [*parts, piece] if size <= limit else []
        passed = size if size > limit else 0
        end = Cursor(at.source, size, 1)
        yield Block(at, end, b"".join(parts), passed, stream.input_bytes())


def _rows(file: InputFile, at: Cursor, columns: Sequence[str], _: int) -> Iterator[Block]:
    """Blocks of rows of a Parquet or Arrow file."""
    table = _parquet if file.kind == "parquet" else _arrow
    for batch, share in table(file, at.offset, columns):
        end = Cursor(at.source, at.offset + len(batch), at.record + len(batch))
        yield Block(at, end, batch, 0, int(share * file.bytes))
        at = end


def _parquet(
    file: InputFile, first: int, columns: Sequence[str]
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """(rows from `first` on, their share of the file).

    Repeated strings stay repeated by reference, so that a small file cannot fill the memory.
    """
    opened: Any = fsspec.open(file.url, "rb")
    with opened as stream:
        parquet = pq.ParquetFile(stream, read_dictionary=list(columns))
        facts = parquet.metadata
        found = [facts.schema.column(i).path for i in range(facts.num_columns)]
        _check_columns(file, columns, found)
        for group in range(facts.num_row_groups):
            rows = facts.row_group(group).num_rows
            if first >= rows:
                first -= rows
                continue
            row_bytes = facts.row_group(group).total_byte_size / max(rows, 1)
            size = max(1, min(4096, int(BLOCK_BYTES / max(row_bytes, 1))))
            for batch in parquet.iter_batches(size, row_groups=[group], columns=list(columns)):
                kept = batch.slice(min(first, len(batch)))
                first -= len(batch) - len(kept)
                if len(kept):
                    yield kept, len(kept) / facts.num_rows


def _arrow(
    file: InputFile, first: int, columns: Sequence[str]
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """(rows from `first` on, their share of the file) of an Arrow stream or file."""
    opened: Any = fsspec.open(file.url, "rb")
    with opened as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        top = [name.split(".")[0] for name in columns]
        _check_columns(file, top, reader.schema.names)
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        )
        position = 0
        for batch in batches:
            batch = batch.select(list(dict.fromkeys(top)))
            batch.validate(full=True)
            now = stream.tell()
            share, position = max(now - position, 0) / file.bytes, now
            for start in range(min(first, len(batch)), len(batch), 1024):
                yield batch.slice(start, 1024), share * min(1024, len(batch) - start) / len(batch)
            first = max(0, first - len(batch))


def _check_columns(file: InputFile, wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{file.url} has no column {missing[0]!r}, but {', '.join(found)}; give one of them "
            "as --text-key or --keep"
        )


class _Guarded:
    """A stream of decompressed bytes that refuses to grow beyond what text can."""

    def __init__(self, stream: Any, raw: Any, file: InputFile) -> None:
        self._stream, self._raw, self._file = stream, raw, file
        self._read = self._reported = 0  # bytes

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._read += len(data)
        limit = max(_FREE_EXPANSION, _MAX_EXPANSION * self._file.bytes)
        if self._file.compression and self._read > limit:
            raise ValueError(
                f"{self._file.url}: {self._file.bytes} bytes expand to more than {limit}, which "
                "text does not; the file is damaged or made to fill the memory; remove it, or "
                "decompress it yourself"
            )
        return data

    def skip(self, offset: int) -> None:
        """Go to a position in the text."""
        if not self._file.compression:
            self._stream.seek(offset)
            self._read = offset
            return
        while self._read < offset:
            if not self.read(min(BLOCK_BYTES, offset - self._read)):
                raise ValueError(f"{self._file.url} is shorter than when it was read before")

    def input_bytes(self) -> int:
        """Bytes of the file read since the last call."""
        position = min(int(self._raw.tell()), self._file.bytes)
        since, self._reported = position - self._reported, position
        return since


@contextmanager
def _open(file: InputFile) -> Iterator[_Guarded]:
    """The file's text as bytes."""
    opened: Any = fsspec.open(file.url, "rb")
    with opened as raw:
        yield _Guarded(_decompressed(raw, file.compression), raw, file)


def _decompressed(raw: Any, compression: str) -> Any:
    match compression:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".bz2":
            return bz2.BZ2File(raw)
        case ".xz":
            return lzma.open(raw)
        case ".zst":
            return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return raw
