"""Rows of a `PREFIX.documents.parquet` against what they should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sip.data.manifest import Source
from megatron_sip.data.provenance import ROW_GROUP, schema_of

_FIXED = len(schema_of())
_REMEDY = "restore the file, or make it again with tools/preprocess_data.py or tools/dataset.py"


@dataclass(frozen=True)
class Row:
    """One document by its provenance.

    Args: start, tokens: where it begins and how long it is, in tokens. source, record: as there.
    """

    start: int
    tokens: int
    source: int
    record: int

    def place(self, sources: tuple[Source, ...]) -> str:
        """FILE:LINE where the document came from, empty if that is not known."""
        if not 0 <= self.source < len(sources):
            return ""
        return f"{sources[self.source].path}:{self.record}"


def kept_columns(path: Path) -> tuple[str, ...]:
    """Names of the columns beside the fixed ones.

    Raises: ValueError if the file is missing, no Parquet file, or the columns are others.
    """
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.remove_metadata()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    kept = tuple(found.names[_FIXED:])
    expected = schema_of(kept)
    if [(f.name, f.type) for f in found] != [(f.name, f.type) for f in expected]:
        raise ValueError(
            f"{path} has the columns {_columns(found)}, but must have {_columns(expected)}; "
            f"{_REMEDY}"
        )
    return kept


def read_rows(path: Path, *, documents: int) -> Iterator[pa.RecordBatch]:
    """All rows in order, at most ROW_GROUP in a batch, with the schema of `schema_of`.

    Raises: ValueError if the file cannot be read, has other columns, or another number of rows, or
            lacks a value.
    """
    schema = schema_of(kept_columns(path))
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != documents:
                raise ValueError(
                    f"{path} has {file.metadata.num_rows} rows, but there are {documents} "
                    f"documents; {_REMEDY}"
                )
            first = 0
            for batch in file.iter_batches(batch_size=ROW_GROUP):
                for name in schema.names[:_FIXED]:
                    if batch.column(name).null_count:
                        missing = int(np.argmax(batch.column(name).is_null().to_numpy(False)))
                        raise ValueError(
                            f"{path}: document {first + missing} has no {name}; {_REMEDY}"
                        )
                yield pa.record_batch(batch.columns, schema=schema)
                first += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def find_row(path: Path, document: int, *, documents: int) -> Row | None:
    """The row of a document, None if the file does not tell; for messages."""
    first = start = 0
    try:
        for batch in read_rows(path, documents=documents):
            tokens = batch.column("tokens").to_numpy().astype(np.int64)
            i = document - first
            if i < len(batch):
                start += int(tokens[:i].sum())
                source, record = (batch.column(name)[i].as_py() for name in ("source", "record"))
                return Row(start, int(tokens[i]), source, record)
            start, first = start + int(tokens.sum()), first + len(batch)
    except ValueError:
        pass  # the caller has something worse to tell
    return None


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({str(error)[:200]}); {_REMEDY}")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
