"""Datasets of ours and of Megatron, and damage to them, for tests."""

from __future__ import annotations

import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import settings
from hypothesis import strategies as st

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.maintenance import layout, pieces, rows
from megatron_sip.data.manifest import Source
from megatron_sip.data.provenance import batch_of
from megatron_sip.data.staged_dataset import StagedDataset, provenance_of
from megatron_sip.data.tokenizer import Tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCAB, EOD, MIN_TOKENS = 300, 1, 3
SOURCES = (Source(path="a.jsonl", bytes=10), Source(path="b.jsonl", bytes=20))

Documents = list[list[int]]
ids = st.lists(st.integers(2, VOCAB - 1), max_size=9)
corpora = st.lists(ids.map(lambda d: [*d, EOD]), min_size=1, max_size=40)
sentences = st.lists(st.lists(st.integers(2, VOCAB - 1), max_size=4), max_size=4)
few = settings(max_examples=25)


class PlainTokenizer(Tokenizer):
    """Ids as words, for tests."""

    digest, vocab_size, eod, special_texts = "ab" * 32, VOCAB, EOD, ()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def _piece(self, i: int) -> str:
        return str(i)

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


TOKENIZER = PlainTokenizer()


def other_tokenizer(**change: Any) -> Tokenizer:
    found = PlainTokenizer()
    for name, value in change.items():
        setattr(found, name, value)
    return found


def build(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = VOCAB,
    min_tokens: int = MIN_TOKENS,
    kept: dict[str, list[str]] | None = None,
    sources: tuple[Source, ...] = SOURCES,
    rows_sources: Sequence[int] | None = None,
    **facts: Any,
) -> IndexedDataset:
    """One build; document i is record i + 1 of its source, which alternates by default."""
    dtype = np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)
    defaults = dict(
        append_eod=True, made_by="preprocess", split="", split_shares="", split_salt="",
        tokenizer_digest=TOKENIZER.digest, eod=EOD, bad_records=0,
    )  # fmt: skip
    names = tuple(kept or ())
    with (
        tempfile.TemporaryDirectory(dir=prefix.parent) as folder,
        closing(
            StagedDataset(Path(folder) / "w", prefix=prefix, vocab_size=vocab_size, kept=names)
        ) as staged,
    ):
        tokens = np.concatenate([np.asarray(d, dtype) for d in documents]).tobytes()
        rows = provenance_of(tokens, np.array([len(d) for d in documents]), dtype=dtype)
        count = len(documents)
        chosen = [i % len(sources) for i in range(count)] if rows_sources is None else rows_sources
        columns = [chosen, range(1, count + 1), *rows.columns[2:], *(kept or {}).values()]
        staged.append(tokens, batch_of(columns, names))
        staged.stage(min_tokens=min_tokens, sources=sources, **defaults | facts)  # type: ignore[arg-type]
        staged.publish()
    return IndexedDataset(prefix)


def megatron_build(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: type = np.uint16
) -> None:
    """Megatron's own builder; a document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        flat = np.array([i for s in document for i in s], dtype)
        builder.add_document(flat, [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")


def texts(prefix: Path) -> Documents:
    dataset = IndexedDataset(prefix)
    found = [d.tolist() for d in dataset.documents()]
    assert found == [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    dataset.close()
    return found


def theirs(prefix: Path) -> Documents:
    """The documents by Megatron's own reader."""
    dataset = MegatronDataset(str(prefix))
    borders = dataset.document_indices.tolist()
    found = [
        np.concatenate([dataset[s] for s in range(a, b)]).tolist() for a, b in pairwise(borders)
    ]
    del dataset
    return found


def rows_of(prefix: Path) -> list[dict[str, Any]]:
    return pq.read_table(f"{prefix}.documents.parquet").to_pylist()


def part(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def alter(path: Path, at: int, data: bytes | None = None) -> None:
    """Overwrite bytes; without data, flip the lowest bit of one."""
    content = bytearray(path.read_bytes())
    data = bytes([content[at] ^ 1]) if data is None else data
    content[at : at + len(data)] = data
    path.write_bytes(content)


@contextmanager
def small_pieces() -> Iterator[None]:
    """Borders of pieces and chunks fall everywhere."""
    with (
        mock.patch.object(pieces, "READ_BYTES", 16),
        mock.patch.object(layout, "CHUNK", 8),
        mock.patch.object(rows, "ROW_GROUP", 5),
    ):
        yield


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name, small_pieces():
        yield Path(name)


@contextmanager
def little_memory(limit: int = 4 << 20) -> Iterator[None]:
    """The block allocates less than `limit` bytes at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def corpus(count: int = 30) -> Documents:
    rng = np.random.default_rng(1)
    return [[*rng.integers(2, VOCAB, n).tolist(), EOD] for n in rng.integers(1, 9, count)]


CORPUS = corpus()
STARTS = np.cumsum([0, *(2 * len(d) for d in CORPUS)]).tolist()


def altered_rows(prefix: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = f"{prefix}.documents.parquet"
    pq.write_table(change(pq.read_table(path)), path, row_group_size=7)


def with_value(name: str, i: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[i] = value
        field = table.schema.field(name)
        return table.set_column(
            table.schema.get_field_index(name), field, pa.array(values, field.type)
        )

    return change
