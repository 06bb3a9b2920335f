"""Rows of Parquet and Arrow files, in pieces of about a block.

A piece holds the wanted columns only, a nested one under its dotted name, and its strings written
out. Before that a string that is repeated is one string, so that a small file cannot fill the
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from megatron_sip.data.preprocess.inputs import InputFile
from megatron_sip.data.preprocess.streams import check_expansion, open_raw
from megatron_sip.data.provenance import numbers

pc: Any = pyarrow.compute  # its functions are made when it is imported
_MARK = b"\xff\xff\xff\xff"  # before a message, but in streams of before 2019
_ROWS = 4096  # of a piece at most


def table_rows(
    file: InputFile, columns: Sequence[str], *, first: int, piece_bytes: int
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """(rows, their share of the file) from row `first` on.

    Args:   columns: dots go deeper. piece_bytes: of the strings of a piece; one row may be longer.
    Raises: ValueError if a column is missing, the strings are more than the file can hold, or
            there are not as many rows as the file says.
    """
    columns = list(dict.fromkeys(columns))
    read = _parquet if file.kind == "parquet" else _arrow
    found = 0
    for batch, share in read(file, columns, first, piece_bytes):
        arrays = [_column(batch, name) for name in columns]
        rows = pa.RecordBatch.from_arrays(arrays, columns)
        ends = np.cumsum(sum(_lengths(array) for array in arrays))
        found += int(ends[-1])
        check_expansion(file, found)
        start = done = 0
        while start < len(rows):
            stop = int(np.searchsorted(ends, done + piece_bytes, "right"))
            stop = min(max(stop, start + 1), start + _ROWS)
            written = [_written_out(array[start:stop]) for array in rows.columns]
            piece = pa.RecordBatch.from_arrays(written, columns)
            yield piece, share * len(piece) / len(rows)
            start, done = stop, int(ends[stop - 1])


def _parquet(
    file: InputFile, columns: Sequence[str], first: int, piece_bytes: int
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Batches with repeated strings by reference."""
    with open_raw(file) as stream:
        facts = pq.read_metadata(stream)
        _check_columns(file, columns, facts.schema.to_arrow_schema())
        paths = [facts.schema.column(i).path for i in range(facts.num_columns)]
        below = tuple(f"{name}." for name in columns)
        strings = [path for path in paths if f"{path}.".startswith(below)]
        groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
        check_expansion(file, sum(group.total_byte_size for group in groups))
        _check_count(file, sum(group.num_rows for group in groups), facts.num_rows)
        parquet = pq.ParquetFile(stream, metadata=facts, read_dictionary=strings)
        for group, rows, size in ((i, g.num_rows, g.total_byte_size) for i, g in enumerate(groups)):
            if first >= rows:
                first -= rows
                continue
            found, step = 0, max(1, min(_ROWS, piece_bytes * rows // max(size, 1)))
            for batch in parquet.iter_batches(step, row_groups=[group], columns=list(columns)):
                found += len(batch)
                kept = batch.slice(min(first, len(batch)))
                first -= len(batch) - len(kept)
                if len(kept):
                    yield kept, len(kept) / facts.num_rows
            _check_count(file, found, rows)


def _arrow(
    file: InputFile, columns: Sequence[str], first: int, _: int
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Batches of an Arrow stream or file."""
    with open_raw(file) as stream:
        start = stream.read(6)
        is_file = start == b"ARROW1"
        stream.seek(0)
        reader: Any = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        _check_columns(file, columns, reader.schema)
        top = list(dict.fromkeys(name.split(".")[0] for name in columns))
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        position = 0
        for batch in batches:
            batch = batch.select(top)
            batch.validate(full=True)
            share, position = max(stream.tell() - position, 0) / file.bytes, stream.tell()
            kept = batch.slice(min(first, len(batch)))
            first -= len(batch) - len(kept)
            if len(kept):
                yield kept, share
        if not is_file:
            _check_end(file, stream, has_mark=start.startswith(_MARK))


def _check_end(file: InputFile, stream: Any, *, has_mark: bool) -> None:
    """An Arrow stream that was cut between two batches, or misread as ended, looks whole."""
    end = stream.tell()
    stream.seek(max(0, end - 8))
    if end != file.bytes or (has_mark and stream.read(8) != _MARK + b"\0\0\0\0"):
        raise ValueError(
            f"{file.url}: damaged or truncated arrow data (no end of the stream at its end); fetch "
            "the file again or remove it"
        )


def _check_columns(file: InputFile, wanted: Sequence[str], schema: pa.Schema) -> None:
    found = list(_names(schema))
    for name in wanted:
        if found.count(name) != 1:
            raise ValueError(
                f"{file.url} has {found.count(name) or 'no'} column{'s' * (name in found)} "
                f"{name!r}, but {', '.join(found) or 'none'}; give one that is there once as "
                "--text-key or --keep"
            )


def _names(fields: Any) -> Iterator[str]:
    """Dotted names of columns and of what is in structs; a name with a dot cannot be told."""
    for field in fields:
        if "." in field.name:
            continue
        yield field.name
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{name}" for name in _names(field.type))


def _check_count(file: InputFile, found: int, said: int) -> None:
    if found != said:
        raise ValueError(
            f"{file.url}: damaged parquet data ({said} rows are said to be there, {found} are); "
            "fetch the file again or remove it"
        )


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column at a dotted name, null where a struct is missing."""
    top, *deeper = name.split(".")
    array = pc.struct_field(batch.column(top), deeper) if deeper else batch.column(top)
    if pa.types.is_nested(array.type):
        array.validate(full=True)  # what is in it is first looked at in a worker
    return array


def _lengths(array: pa.Array) -> np.ndarray:
    """int64[rows]: bytes of each string, their mean for values of another type."""
    kind: Any = array.type
    if pa.types.is_dictionary(kind):
        if not len(array.dictionary):
            return np.zeros(len(array), np.int64)
        indices = pc.fill_null(array.indices, 0).cast(pa.int64())
        return _lengths(array.dictionary)[numbers(indices)]
    if not _is_bytes(kind):
        return np.full(len(array), array.nbytes // max(len(array), 1), np.int64)
    return numbers(pc.fill_null(pc.binary_length(array), 0).cast(pa.int64()))


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    plain = types.is_string(kind) or types.is_binary(kind)
    return plain or types.is_large_string(kind) or types.is_large_binary(kind)


def _written_out(array: pa.Array) -> pa.Array:
    """The values alone: a slice would drag the whole along to another process."""
    if pa.types.is_dictionary(array.type):
        return array.dictionary_decode()
    return pa.concat_arrays([array])
