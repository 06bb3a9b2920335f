"""A local dataset as merge and split read it: tokens with their rows, each document checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_sip.data.document_mask import load_header
from megatron_sip.data.indexed_files import check_files
from megatron_sip.data.maintenance.layout import Layout, open_layout
from megatron_sip.data.maintenance.pieces import Piece, read_pieces
from megatron_sip.data.maintenance.rows import kept_columns, read_rows
from megatron_sip.data.manifest import Manifest, part_path
from megatron_sip.data.staged_dataset import provenance_of
from megatron_sip.data.storage import LocalBytes, is_url


@dataclass(frozen=True)
class Published:
    """A dataset whose parts agree in size. Use `open_published`.

    Args: prefix: path without `.bin`. manifest: its facts. layout: its index. kept: columns of its
          provenance beside the fixed ones. min_tokens: of its eligible documents.
    """

    prefix: Path
    manifest: Manifest
    layout: Layout
    kept: tuple[str, ...]
    min_tokens: int

    def documents(self) -> Iterator[tuple[Piece, pa.RecordBatch]]:
        """Every document in order, with its row.

        Raises: ValueError naming the first document whose row or digest is not its own.
        """
        first = 0
        with closing(LocalBytes(part_path(self.prefix, ".bin"))) as data:
            path = part_path(self.prefix, ".documents.parquet")
            for batch in read_rows(path, documents=self.manifest.documents):
                last = first + len(batch)
                for piece in read_pieces(self.layout, data, first=first, last=last):
                    rows = batch.slice(piece.first - first, len(piece.lengths))
                    self._check(piece, rows)
                    yield piece, rows
                first = last

    def _check(self, piece: Piece, rows: pa.RecordBatch) -> None:
        lengths = rows.column("tokens").to_numpy()
        bad = lengths != piece.lengths
        bad |= piece_digests(piece) != rows.column("tokens_xxh3_64").to_numpy()
        if bad.any():
            document = piece.first + int(np.argmax(bad))
            raise ValueError(
                f"{self.prefix}: document {document} is not the one that "
                f"{self.prefix.name}.documents.parquet tells of: one of the files was altered; "
                f"see tools/dataset.py verify {self.prefix}"
            )


def piece_digests(piece: Piece) -> np.ndarray:
    """uint64[n]: tokens_xxh3_64 of each document of a piece."""
    tokens = piece.tokens
    rows = provenance_of(tokens.view(np.uint8).data, piece.lengths, dtype=tokens.dtype)
    return rows.column("tokens_xxh3_64").to_numpy()


def local_prefix(prefix: str | Path) -> Path:
    """Raises: ValueError if the prefix names an object store."""
    if is_url(prefix):
        raise ValueError(f"{prefix} is in an object store; copy its files to a local disk first")
    return Path(prefix)


def open_published(prefix: str | Path) -> Published:
    """Check the small parts of a dataset. The caller is about to read all of it.

    Raises: ValueError naming the first part that is missing, truncated or altered.
    """
    prefix = local_prefix(prefix)
    manifest = check_files(prefix)
    return Published(
        prefix,
        manifest,
        open_layout(part_path(prefix, ".idx")),
        kept_columns(part_path(prefix, ".documents.parquet")),
        load_header(part_path(prefix, ".eligible")).min_tokens,
    )
