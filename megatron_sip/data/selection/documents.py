"""The documents of a dataset as batches of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.manifest import part_path
from megatron_sip.data.provenance import read_column
from megatron_sip.data.selection.steps import Batch
from megatron_sip.data.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 24
_END = object()


def batches(
    dataset: IndexedDataset,
    prefix: Path,
    members: np.ndarray,
    columns: Sequence[str],
    tokenizer: Tokenizer,
) -> Iterator[tuple[Batch, int]]:
    """Read a dataset's documents once, in order.

    Args:   prefix: its path. members: bool[documents], which to decode. columns: of
            PREFIX.documents.parquet. tokenizer: that the dataset was made with.
    Yields: (members with their text, documents read so far), the last batch perhaps without any.
    Raises: ValueError if the Parquet file is missing, has no such column, or fewer rows.
    """
    path = part_path(prefix, ".documents.parquet")
    values = [_values(path, column) for column in columns]
    held: list[tuple[int, str, tuple[Any, ...]]] = []
    characters = 0
    for i, tokens in enumerate(dataset.documents()):
        row = tuple(next(column, _END) for column in values)
        if _END in row:
            raise ValueError(
                f"{path} has {i} rows, but the dataset {dataset.num_documents} documents; make the "
                "dataset again with tools/preprocess_data.py"
            )
        if members[i]:
            text = tokenizer.decode(tokens)
            held.append((i, text, row))
            characters += len(text)
        if len(held) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield _batch(held, columns), i + 1
            held, characters = [], 0
    yield _batch(held, columns), dataset.num_documents


def _batch(held: Sequence[tuple[int, str, tuple[Any, ...]]], columns: Sequence[str]) -> Batch:
    return Batch(
        np.array([i for i, _, _ in held], np.int64),
        tuple(text for _, text, _ in held),
        {column: tuple(row[k] for _, _, row in held) for k, column in enumerate(columns)},
    )


def _values(path: Path, column: str) -> Iterator[Any]:
    for array in read_column(path, column):
        yield from array.to_pylist()
