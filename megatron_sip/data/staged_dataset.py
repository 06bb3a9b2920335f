"""A dataset while it is being made: it grows in a working folder and appears whole at the end.

`.bin` and the provenance stream only grow, so a position (their sizes) is enough to go on after a
kill: both are cut back to it. Memory does not grow with the documents: `.idx`, `.eligible` and
the Parquet file are made at the end from the stream, piece by piece. `.idx` and `.bin` are byte for
byte those of Megatron-Core's own builder with one sequence a document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from megatron_sip.data.document_mask import mask_of_bits
from megatron_sip.data.indexed_files import CODES, HEADER, MAGIC
from megatron_sip.data.manifest import PARTS, Manifest, file_digest, part_path
from megatron_sip.data.provenance import (
    batch_of,
    numbers,
    row_groups,
    schema_of,
    stream_batches,
    write_parquet,
)
from megatron_sip.data.token_dtype import dtype_of
from megatron_sip.publish import sync


@dataclass(frozen=True)
class Position:
    """How far a staged dataset has come.

    Args: bin_bytes, stream_bytes: sizes of its two growing files. documents, tokens: in them.
    """

    bin_bytes: int = 0
    stream_bytes: int = 0
    documents: int = 0
    tokens: int = 0


class StagedDataset:
    """Append documents, `stage` the parts, `publish` them.

    Args:   folder: working folder on the file system of `prefix`. prefix: path without `.bin`.
            vocab_size: of the tokenizer. kept: extra columns of the provenance.
            dtype: of the token ids; None: as Megatron-Core chooses it for the vocabulary.
            position: of an earlier process, to go on from; None: anew.
    Raises: ValueError if the files are shorter than `position` says.
    """

    def __init__(
        self,
        folder: Path,
        *,
        prefix: Path,
        vocab_size: int,
        kept: tuple[str, ...] = (),
        dtype: np.dtype | None = None,
        position: Position | None = None,
    ) -> None:
        self.prefix, self.vocab_size = Path(prefix), vocab_size
        self.dtype: np.dtype = dtype_of(vocab_size) if dtype is None else dtype
        self._folder, self._schema = Path(folder), schema_of(kept)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bin = _reopen(self._part(".bin"), position.bin_bytes if position else None)
        self._stream_path = self._folder / "documents.arrows"
        self._stream = _reopen(self._stream_path, position.stream_bytes if position else None)
        if position is None:
            self._stream.write(self._schema.serialize())
        self.documents, self.tokens = (position.documents, position.tokens) if position else (0, 0)

    def append(self, tokens: bytes | memoryview, documents: pa.RecordBatch) -> None:
        """Add documents.

        Args: tokens: dtype[T], all of them one after another. documents: their provenance.
        """
        self._bin.write(tokens)
        self._stream.write(documents.serialize())
        self.documents += len(documents)
        self.tokens += len(tokens) // self.dtype.itemsize

    def position(self) -> Position:
        """Force all to the disk. Returns: where a later process may go on."""
        for stream in (self._bin, self._stream):
            stream.flush()
            os.fsync(stream.fileno())
        return Position(self._bin.tell(), self._stream.tell(), self.documents, self.tokens)

    def check_not_empty(self) -> None:
        """Raises: ValueError if there is no document."""
        if not self.documents:
            raise ValueError(f"{self.prefix}: the dataset has no document; check the inputs")

    def stage(self, *, min_tokens: int, append_eod: bool, **facts: Any) -> Manifest:
        """Make the other parts in the working folder; nothing is visible yet.

        Args:    min_tokens: documents with at least so many, without their end-of-document id,
                 are eligible. append_eod: each document ends with one.
                 facts: the manifest's fields that the dataset cannot know.
        Returns: the manifest that `publish` makes visible.
        Raises:  ValueError if there is no document.
        """
        self.check_not_empty()
        self.position()
        index, data = self._part(".idx"), self._part(".bin")
        write_index(index, self._stream_path, dtype=self.dtype, documents=self.documents)
        index_digest = file_digest(index)
        shortest = min_tokens + int(append_eod)
        tables = row_groups(self._stream_path)  # of a multiple of 8 rows, but for the last
        lengths = (numbers(table["tokens"].chunk(0)) for table in tables)
        bits = [np.packbits(found >= shortest, bitorder="little") for found in lengths]
        mask_of_bits(
            np.concatenate(bits),
            documents=self.documents,
            min_tokens=min_tokens,
            idx_xxh3_128=index_digest,
        ).save(self._part(".eligible"))
        write_parquet(self._stream_path, self._part(".documents.parquet"), schema=self._schema)
        manifest = Manifest(
            documents=self.documents,
            tokens=self.tokens,
            dtype="uint16" if self.dtype == np.uint16 else "int32",
            vocab_size=self.vocab_size,
            append_eod=append_eod,
            idx_bytes=index.stat().st_size,
            idx_xxh3_128=index_digest,
            bin_bytes=data.stat().st_size,
            bin_xxh3_128=file_digest(data),
            **facts,
        )
        text = manifest.model_dump_json(indent=2) + "\n"
        self._part(".manifest.json").write_text(text, encoding="utf-8")
        for part in PARTS:
            sync(self._part(part))
        return manifest

    def withdraw_older(self) -> None:
        """Make an older dataset of the same name invalid, before any part of it is replaced."""
        part_path(self.prefix, ".manifest.json").unlink(missing_ok=True)

    def publish(self) -> None:
        """Give the staged files their names, the manifest last; an older dataset is replaced.

        The old manifest goes first, so that a reader never sees a mixture as valid.
        """
        self.withdraw_older()
        for part in PARTS:
            self._part(part).replace(part_path(self.prefix, part))
        sync(self.prefix.parent)

    def close(self) -> None:
        """Close the growing files."""
        self._bin.close()
        self._stream.close()

    def _part(self, suffix: str) -> Path:
        return self._folder / f"dataset{suffix}"


def provenance_of(
    tokens: bytes | memoryview, lengths: np.ndarray, *, dtype: np.dtype
) -> pa.RecordBatch:
    """Rows for documents of which no more than their tokens is known.

    Args: tokens: dtype[T], all documents one after another. lengths: int[D], tokens of each.
    """
    view, size = memoryview(tokens), dtype.itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * size
    starts = ends - np.asarray(lengths, np.int64) * size
    digests = [xxhash.xxh3_64_intdigest(view[a:b]) for a, b in zip(starts, ends, strict=True)]
    unknown = np.full(len(lengths), -1)
    return batch_of([unknown, unknown, lengths, np.zeros(len(lengths), np.uint64), digests])


def write_index(output: Path, stream: Path, *, dtype: np.dtype, documents: int) -> None:
    """The `.idx` of documents whose lengths are in a provenance stream; memory holds a batch."""
    with open(output, "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, CODES[dtype], documents, documents + 1))
        for lengths in _lengths(stream):
            index.write(lengths.astype("<i4").tobytes())
        start = 0
        for lengths in _lengths(stream):
            ends = start + np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
            pointers = np.concatenate(([start], ends[:-1]))
            index.write(pointers.astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, documents + 1, 1 << 20):
            borders = np.arange(first, min(first + (1 << 20), documents + 1), dtype="<i8")
            index.write(borders.tobytes())


def _lengths(stream: Path) -> Iterator[np.ndarray]:
    """int32[D]: tokens of each document, batch by batch; no batch is empty."""
    for batch in stream_batches(stream):
        if len(batch):
            yield numbers(batch.column("tokens"))


def _reopen(path: Path, size: int | None) -> Any:
    """A file to append to, cut back to `size`; None: emptied."""
    if size is None:
        return open(path, "wb")
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise ValueError(
            f"{path} has {found} bytes, but {size} were written before; the working folder was "
            "altered: remove it and begin anew"
        )
    os.truncate(path, size)
    return open(path, "ab")
