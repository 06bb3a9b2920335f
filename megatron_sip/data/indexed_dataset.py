"""Reader of Megatron's `.bin/.idx` datasets: memory-mapped by Megatron-Core, checked by us.

Beside the two files stands a manifest; a part that is missing, truncated or altered is an error
that says so. `indexed_dataset_writer` makes them. Only local files.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np

from megatron_sip.data.manifest import Manifest, file_digest, load_manifest, part_path

with warnings.catch_warnings():  # at import it reports each GPU package that is not installed
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    from megatron.core.datasets import indexed_dataset as megatron

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
_MAGIC = b"MMIDIDX\x00\x00"
_REMEDY = "make the dataset again with tools/preprocess_data.py"


class IndexedDataset:
    """Documents of a published dataset, memory-mapped by Megatron's reader.

    Args:   prefix: path without `.bin`.
    Raises: ValueError naming file, sizes and remedy if a part is missing, truncated or altered.
            `.bin` is checked by size alone; `verify` reads it whole.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        self.manifest = load_manifest(part_path(self.prefix, ".manifest.json"))
        _check_files(self.prefix, self.manifest)
        self._megatron = megatron.IndexedDataset(str(self.prefix))
        self.num_documents: int = len(self._megatron.document_indices) - 1
        index = self._megatron.index
        end = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
        if end != self.manifest.bin_bytes:
            raise ValueError(
                f"{self.prefix}.bin has {self.manifest.bin_bytes} bytes, but {self.prefix}.idx "
                f"says {end}; {_REMEDY}"
            )

    @property
    def data_digest(self) -> str:
        """16 hex digits that name the data."""
        return self.manifest.data_digest

    def document(self, i: int) -> np.ndarray:
        """int32[T]: a copy of document i, its end-of-document id included.

        Raises: ValueError if i is outside [0, num_documents).
        """
        if not 0 <= i < self.num_documents:
            raise ValueError(f"{self.prefix}: document {i} must be in [0, {self.num_documents})")
        index = self._megatron.index
        first, last = self._megatron.document_indices[i : i + 2]
        count = int(index.sequence_lengths[first:last].sum(dtype=np.int64))
        offset = int(index.sequence_pointers[first])  # bytes
        return self._megatron.bin_reader.read(index.dtype, count, offset).astype(np.int32)

    def document_lengths(self) -> np.ndarray:
        """int64[num_documents]: tokens of each document, its end-of-document id included."""
        ends = np.cumsum(self._megatron.sequence_lengths, dtype=np.int64)
        return np.diff(np.concatenate(([0], ends))[self._megatron.document_indices])

    def check_tokenizer(self, digest: str, *, path: Path) -> None:
        """Raises: ValueError if the data was made with another tokenizer than that at `path`."""
        if digest != self.manifest.tokenizer_digest:
            raise ValueError(
                f"{self.prefix} was made with another tokenizer (sha256 "
                f"{self.manifest.tokenizer_digest[:12]}) than {path} ({digest[:12]}); give the "
                f"same file, or {_REMEDY}"
            )

    def verify(self) -> None:
        """Read `.bin` whole. Raises: ValueError if its digest is not the manifest's."""
        path, found = part_path(self.prefix, ".bin"), file_digest(part_path(self.prefix, ".bin"))
        if found != self.manifest.bin_xxh3_128:
            raise ValueError(
                f"{path} has digest {found}, but its manifest says {self.manifest.bin_xxh3_128}; "
                f"the file was altered; {_REMEDY}"
            )


def _check_files(prefix: Path, manifest: Manifest) -> None:
    """Sizes, header and digest, before Megatron maps anything."""
    index, data = part_path(prefix, ".idx"), part_path(prefix, ".bin")
    for path, expected in ((index, manifest.idx_bytes), (data, manifest.bin_bytes)):
        if not path.is_file():
            raise ValueError(f"{path}: no such file, its manifest says {expected} bytes; {_REMEDY}")
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but its manifest says {expected}; "
                f"the file is truncated or altered; {_REMEDY}"
            )
    if file_digest(index) != manifest.idx_xxh3_128:
        raise ValueError(f"{index} has another digest than its manifest says; {_REMEDY}")
    with open(index, "rb") as stream:
        header = stream.read(_HEADER.size)
    magic, version, code, sequences, borders = (
        _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
    )
    if (magic, version) != (_MAGIC, 1) or code not in {dtype.value for dtype in megatron.DType}:
        raise ValueError(f"{index}: {header[:18]!r} is no Megatron index header; {_REMEDY}")
    dtype = np.dtype(megatron.DType.dtype_from_code(code))
    expected_idx = _HEADER.size + 12 * sequences + 8 * borders
    if (dtype.name, borders - 1, expected_idx) != (
        manifest.dtype, manifest.documents, manifest.idx_bytes,
    ) or manifest.tokens * dtype.itemsize != manifest.bin_bytes:  # fmt: skip
        raise ValueError(
            f"{index} says {borders - 1} documents of {dtype.name} in {expected_idx} index bytes, "
            f"its manifest {manifest.documents} of {manifest.dtype} in {manifest.idx_bytes} and "
            f"{manifest.tokens} tokens in {manifest.bin_bytes} data bytes; {_REMEDY}"
        )
