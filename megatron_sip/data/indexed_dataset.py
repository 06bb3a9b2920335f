"""Reader of Megatron's `.bin/.idx` datasets: memory-mapped by Megatron-Core, checked by us.

Beside the two files stands a manifest; a part that is missing, truncated or altered is an error
that says so. `indexed_dataset_writer` makes them. Only local files.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from megatron_sip.data.indexed_files import REMEDY, check_files, check_tokenizer
from megatron_sip.data.manifest import file_digest, part_path

with warnings.catch_warnings():  # at import it reports each GPU package that is not installed
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    from megatron.core.datasets import indexed_dataset as megatron


class IndexedDataset:
    """Documents of a published dataset, memory-mapped by Megatron's reader.

    Args:   prefix: path without `.bin`.
    Raises: ValueError naming file, sizes and remedy if a part is missing, truncated or altered.
            `.bin` is checked by size alone; `verify` reads it whole.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        self.manifest = check_files(self.prefix)
        self._megatron = megatron.IndexedDataset(str(self.prefix))
        self.num_documents: int = len(self._megatron.document_indices) - 1
        index = self._megatron.index
        end = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
        if end != self.manifest.bin_bytes:
            raise ValueError(
                f"{self.prefix}.bin has {self.manifest.bin_bytes} bytes, but {self.prefix}.idx "
                f"says {end}; {REMEDY}"
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
        check_tokenizer(self.prefix, self.manifest, digest=digest, path=path)

    def verify(self) -> None:
        """Read `.bin` whole. Raises: ValueError if its digest is not the manifest's."""
        path, found = part_path(self.prefix, ".bin"), file_digest(part_path(self.prefix, ".bin"))
        if found != self.manifest.bin_xxh3_128:
            raise ValueError(
                f"{path} has digest {found}, but its manifest says {self.manifest.bin_xxh3_128}; "
                f"the file was altered; {REMEDY}"
            )
