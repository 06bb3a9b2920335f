"""Which samples are known to have unsafe text: those of documents in a mask of their dataset."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_sip.data.blended_corpus import BlendedCorpus
from megatron_sip.data.document_mask import DocumentMask, load_header, load_mask
from megatron_sip.data.manifest import load_manifest
from megatron_sip.data.storage import local_part
from megatron_sip.types import SipSample


class UnsafeDocuments:
    """Documents of a corpus in the masks PREFIX.NAME.

    Args:   corpus: where samples come from. name: of the mask; "": nothing is known.
            cache_dir: for parts of datasets in object stores.
    Raises: ValueError if a dataset has no such mask, or it is damaged or of other data.
    """

    def __init__(self, corpus: BlendedCorpus, name: str, *, cache_dir: Path | None) -> None:
        self._corpus, self._name, self._cache_dir = corpus, name, cache_dir
        self._masks: dict[str, DocumentMask] = {}
        digest = hashlib.sha256()
        if name:
            for part in corpus.parts:
                for prefix in part.prefixes:
                    header = load_header(self._path(prefix))
                    manifest = load_manifest(
                        local_part(prefix, ".manifest.json", cache_dir=cache_dir)
                    )
                    if header.idx_xxh3_128 != manifest.idx_xxh3_128:
                        raise ValueError(
                            f"{self._path(prefix)} was made of other data than {prefix}.idx; make "
                            "it again with tools/dataset.py mask"
                        )
                    digest.update(header.payload_xxh3_128.encode())
        self.digest = f"{name} {digest.hexdigest()[:16]}" if name else ""
        """Of all masks; "" without any."""

    def known(self, sample: SipSample) -> bool | None:
        """Whether the sample's document is in the mask; None without a mask."""
        if not self._name:
            return None
        document = sample.document_id
        for part in self._corpus.parts:
            if document < part.num_documents:
                file, local = part.locate(document)
                return local in self._mask(part.prefixes[file])
            document -= part.num_documents
        raise AssertionError(f"document {sample.document_id} is of no part")

    def _mask(self, prefix: str) -> DocumentMask:
        if prefix not in self._masks:
            self._masks[prefix] = load_mask(self._path(prefix))
        return self._masks[prefix]

    def _path(self, prefix: str) -> Path:
        return local_part(prefix, f".{self._name}", cache_dir=self._cache_dir)
