"""Reader of Megatron's `.bin/.idx` datasets, on a disk or in an object store.

Beside the two files stands a manifest; a part that is missing, truncated or altered is an error
that says so. `staged_dataset` makes them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_sip.data.indexed_files import (
    HEADER,
    REMEDY,
    IndexHeader,
    check_headers,
    check_index_digest,
    check_tokenizer,
    read_header,
)
from megatron_sip.data.manifest import Manifest, file_digest
from megatron_sip.data.storage import local_part, map_file, open_bytes

_READ_BYTES = 1 << 24


class IndexArrays:
    """The three arrays of a `.idx`, memory-mapped.

    Args: lengths: int32[S], tokens of each sequence. pointers: int64[S], bytes before it in `.bin`.
          borders: int64[D + 1], document i is the sequences borders[i] : borders[i + 1].
    """

    def __init__(self, path: Path, header: IndexHeader) -> None:
        s, start = header.sequences, HEADER.size
        data = map_file(path)
        self.lengths = data[start : start + 4 * s].view("<i4")
        self.pointers = data[start + 4 * s : start + 12 * s].view("<i8")
        self.borders = data[start + 12 * s :].view("<i8")

    def span(self, first: int, last: int, itemsize: int) -> tuple[int, int]:
        """Bytes [start, end) of the documents first : last, which lie together."""
        a, b = int(self.borders[first]), int(self.borders[last])
        if a == b:
            return 0, 0
        last_bytes = int(self.lengths[b - 1]) * itemsize
        return int(self.pointers[a]), int(self.pointers[b - 1]) + last_bytes


class IndexedDataset:
    """Documents of a published dataset.

    Args:   prefix: path or fsspec URL without `.bin`. cache_dir: folder for the small parts of a
            URL's dataset.
    Raises: ValueError naming file, sizes and remedy if a part is missing, truncated or altered.
            Their bytes are not read: `tools/dataset.py verify` does.
    """

    def __init__(self, prefix: str | Path, *, cache_dir: Path | None = None) -> None:
        self.prefix = prefix
        self.manifest: Manifest = check_headers(prefix, cache_dir=cache_dir)
        self.num_documents: int = self.manifest.documents
        self.dtype = np.dtype(self.manifest.dtype)
        index = local_part(prefix, ".idx", cache_dir=cache_dir)
        self.index = IndexArrays(index, read_header(index))
        self._bytes = open_bytes(prefix)
        end = self.index.span(0, self.num_documents, self.dtype.itemsize)[1]
        if not end == self.manifest.bin_bytes == self._bytes.size:
            raise ValueError(
                f"{self._bytes.name} has {self._bytes.size} bytes, its manifest says "
                f"{self.manifest.bin_bytes}, {index} says {end}; {REMEDY}"
            )

    @property
    def data_digest(self) -> str:
        """16 hex digits that name the data."""
        return self.manifest.data_digest

    def document(self, i: int) -> np.ndarray:
        """int32[T]: a copy of document i, its end-of-document id included.

        Raises: ValueError if i is outside [0, num_documents), or the index lies about it.
        """
        if not 0 <= i < self.num_documents:
            raise ValueError(f"{self.prefix}: document {i} must be in [0, {self.num_documents})")
        return self._tokens(i, i + 1).astype(np.int32)

    def documents(self) -> Iterator[np.ndarray]:
        """Every document in order, dtype[T] each, read in large pieces."""
        lengths = self.document_lengths()
        ends = np.cumsum(lengths)
        first = 0
        while first < self.num_documents:
            limit = (ends[first - 1] if first else 0) + _READ_BYTES // self.dtype.itemsize
            last = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
            yield from np.split(self._tokens(first, last), np.cumsum(lengths[first : last - 1]))
            first = last

    def document_lengths(self) -> np.ndarray:
        """int64[num_documents]: tokens of each document, its end-of-document id included."""
        ends = np.concatenate(([0], np.cumsum(self.index.lengths, dtype=np.int64)))
        return np.diff(ends[self.index.borders])

    def check_tokenizer(self, digest: str, *, path: Path) -> None:
        """Raises: ValueError if the data was made with another tokenizer than that at `path`."""
        check_tokenizer(self.prefix, self.manifest, digest=digest, path=path)

    def close(self) -> None:
        """Close the files; documents can no longer be read."""
        self._bytes.close()

    def _tokens(self, first: int, last: int) -> np.ndarray:
        """dtype[T]: documents first : last, one after another."""
        start, end = self.index.span(first, last, self.dtype.itemsize)
        if not 0 <= start <= end <= self.manifest.bin_bytes:
            raise ValueError(
                f"{self.prefix}.idx: document {first} lies at bytes {start}..{end} of "
                f"{self.manifest.bin_bytes}; {REMEDY}"
            )
        data = self._bytes.read(start, end - start)
        if len(data) != end - start:
            raise ValueError(
                f"{self._bytes.name}: {len(data)} of {end - start} bytes could be read at "
                f"{start}; the file was truncated while it was open; {REMEDY}"
            )
        return np.frombuffer(data, self.dtype)


def verify_digests(dataset: IndexedDataset) -> None:
    """Read a local `.idx` and `.bin` whole.

    Raises: ValueError if the digest of one is not the manifest's.
    """
    check_index_digest(dataset.prefix, dataset.manifest, cache_dir=None)
    path = local_part(dataset.prefix, ".bin", cache_dir=None)
    found = file_digest(path)
    if found != dataset.manifest.bin_xxh3_128:
        raise ValueError(
            f"{path} has digest {found}, but its manifest says {dataset.manifest.bin_xxh3_128}; "
            f"the file was altered; {REMEDY}"
        )
