"""Atomic writer of Megatron's `.bin/.idx` datasets.

The bytes are those of Megatron-Core's own builder, one sequence a document, so Megatron's tools
read them. We add a manifest and publication under final names only when all is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.data.indexed_dataset import megatron
from megatron_sip.data.manifest import PARTS, Manifest, file_digest, part_path
from megatron_sip.publish import sync, temporary_name


class IndexedDatasetWriter:
    """Write documents under temporary names, `stage` them, then `publish` or `discard`.

    Memory grows by one list entry a document (Megatron's builder keeps their lengths).
    """

    def __init__(self, prefix: Path, *, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.documents = 0
        self.tokens = 0
        self._temporary = {p: temporary_name(part_path(self.prefix, p)) for p in PARTS}
        self._dtype = megatron.DType.optimal_dtype(vocab_size)
        self._builder = megatron.IndexedDatasetBuilder(
            str(self._temporary[".bin"]), dtype=self._dtype
        )

    def add(self, token_ids: Sequence[int] | np.ndarray) -> None:
        """Append one document, int[T].

        Raises: ValueError if it is empty or an id is outside [0, vocab_size).
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        if not ids.size or not 0 <= ids.min() <= ids.max() < self.vocab_size:
            found = f"ids {ids.min()}..{ids.max()}" if ids.size else "no ids"
            raise ValueError(
                f"{self.prefix}: document {self.documents} has {found}, but needs at least one "
                f"and all in [0, {self.vocab_size}); use the tokenizer that the writer was told of"
            )
        self._builder.add_document(ids, [ids.size])  # pyright: ignore[reportArgumentType]
        self.documents += 1
        self.tokens += ids.size

    def stage(self, **facts: Any) -> Manifest:
        """Close and sync the files; nothing is visible yet.

        Args:    facts: the manifest's fields that the writer cannot know.
        Returns: the manifest that `publish` makes visible.
        Raises:  ValueError if no document was added.
        """
        if not self.documents:
            raise ValueError(f"{self.prefix}: the dataset has no document; check the inputs")
        data, index, manifest_path = (self._temporary[part] for part in PARTS)
        self._builder.finalize(str(index))
        manifest = Manifest(
            documents=self.documents,
            tokens=self.tokens,
            dtype=np.dtype(self._dtype).name,  # pyright: ignore[reportArgumentType]
            vocab_size=self.vocab_size,
            idx_bytes=index.stat().st_size,
            idx_xxh3_128=file_digest(index),
            bin_bytes=data.stat().st_size,
            bin_xxh3_128=file_digest(data),
            **facts,
        )
        manifest_path.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in (data, index, manifest_path):
            sync(path)
        return manifest

    def publish(self) -> None:
        """Give the staged files their names, the manifest last; an older dataset is replaced.

        The old manifest goes first, so that a reader never sees a mixture as valid.
        """
        part_path(self.prefix, ".manifest.json").unlink(missing_ok=True)
        for part in PARTS:
            self._temporary[part].replace(part_path(self.prefix, part))
        sync(self.prefix.parent)

    def discard(self) -> None:
        """Remove what is not published; does nothing after `publish`."""
        self._builder.data_file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
