"""`PREFIX.documents.parquet`: where each document came from, and digests to tell it by.

While a dataset is being made the rows lie in an Arrow stream that only grows, so that a run that
was killed can cut it back to a known length. The Parquet file is made of it at the end, in row
groups of a fixed size: its bytes depend on the rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 65_536  # documents
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("source", pa.int32(), "index into the manifest's sources, -1: unknown"),
    ("record", pa.int64(), "line of a .jsonl file or row of a table, from 1; 1 for a text file"),
    ("tokens", pa.int32(), "tokens of the document, its end-of-document id included"),
    ("text_xxh3_64", pa.uint64(), "of the text's UTF-8 bytes; 0: the text was not read"),
    ("tokens_xxh3_64", pa.uint64(), "of the document's bytes in .bin"),
)


def schema_of(kept: Sequence[str] = ()) -> pa.Schema:
    """Columns of the provenance.

    Args: kept: keys of the records whose values are kept, as strings.
    """
    fixed = [pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in _FIXED]
    return pa.schema(fixed + [pa.field(name, pa.string()) for name in kept])


def batch_of(columns: Sequence[Any], kept: Sequence[str] = ()) -> pa.RecordBatch:
    """Rows from columns in the order of `schema_of`."""
    schema = schema_of(kept)
    arrays = [_array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def numbers(column: pa.Array) -> np.ndarray:
    """A column of numbers without a copy; `to_numpy` would import pandas."""
    dtype = np.dtype(column.type.to_pandas_dtype())
    whole = np.frombuffer(column.buffers()[1], dtype)
    return whole[column.offset : column.offset + len(column)]


def _array(values: Any, kind: Any) -> pa.Array:
    """A column. Numbers go by their buffer, since pa.array imports pandas, which takes longer than
    the work of a short-lived process."""
    if kind == pa.string():
        return pa.array(values, kind)
    numbers = np.asarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def stream_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of a growing Arrow stream, in order."""
    with pa.OSFile(str(path)) as stream:
        yield from pa.ipc.open_stream(stream)


def row_groups(path: Path) -> Iterator[pa.Table]:
    """The rows of an Arrow stream in tables of ROW_GROUP rows, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in stream_batches(path):
        waiting.append(batch)
        rows += len(batch)
        while rows >= ROW_GROUP:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, ROW_GROUP).combine_chunks()
            rest = table.slice(ROW_GROUP)
            waiting, rows = rest.to_batches(), len(rest)
    if rows:
        yield pa.Table.from_batches(waiting).combine_chunks()


def write_parquet(stream: Path, output: Path, *, schema: pa.Schema) -> None:
    """The provenance file from the Arrow stream; memory holds one row group."""
    with pq.ParquetWriter(output, schema, compression="zstd") as writer:
        for table in row_groups(stream):
            writer.write_table(table, row_group_size=ROW_GROUP)


def read_row(path: Path, row: int) -> dict[str, Any]:
    """One document's provenance; reads a row group.

    Raises: ValueError if the file cannot be read or has no such row.
    """
    try:
        with pq.ParquetFile(path) as file:
            group, inside = divmod(row, ROW_GROUP)
            if not 0 <= row < file.metadata.num_rows:
                raise ValueError(f"{path}: document {row} must be in [0, {file.metadata.num_rows})")
            return file.read_row_group(group).slice(inside, 1).to_pylist()[0]
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def read_column(path: Path, name: str) -> Iterator[pa.Array]:
    """One column of a provenance file, row group by row group.

    Raises: ValueError if the file is missing, no Parquet file, or has no such column.
    """
    try:
        with pq.ParquetFile(path) as file:
            if name not in file.schema_arrow.names:
                raise ValueError(
                    f"{path} has no column {name!r}, but {', '.join(file.schema_arrow.names)}"
                )
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=[name])[name].combine_chunks()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); make it again with tools/preprocess_data.py or "
            "tools/dataset.py adopt"
        ) from None
