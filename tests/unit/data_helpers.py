"""Small indexed datasets for tests."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.data.blended_corpus import BlendedCorpus, open_corpus
from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.staged_dataset import StagedDataset, provenance_of

FACTS: dict[str, Any] = {
    "made_by": "preprocess",
    "split": "",
    "split_shares": "",
    "split_salt": "",
    "tokenizer_digest": "ab" * 32,
    "bad_records": 0,
    "sources": (),
}


def stage(
    prefix: Path, documents: Sequence[Sequence[int]], *, vocab_size: int = 300, **changes: Any
) -> StagedDataset:
    """A dataset with these documents, staged but not published."""
    staged = StagedDataset(
        prefix.with_name(prefix.name + ".partial"), prefix=prefix, vocab_size=vocab_size
    )
    for document in documents:
        tokens = np.asarray(document, staged.dtype).tobytes()
        staged.append(tokens, provenance_of(tokens, np.array([len(document)]), dtype=staged.dtype))
    staged.stage(**({"eod": 1, "append_eod": True, "min_tokens": 10} | FACTS | changes))
    return staged


def write_dataset(
    prefix: Path, documents: Sequence[Sequence[int]], *, vocab_size: int = 300, **changes: Any
) -> IndexedDataset:
    """Publish a dataset. Args: documents: token ids, end-of-document ids included."""
    staged = stage(prefix, documents, vocab_size=vocab_size, **changes)
    staged.publish()
    staged.close()
    shutil.rmtree(prefix.with_name(prefix.name + ".partial"))
    return IndexedDataset(prefix)


def corpus_of(dataset: IndexedDataset, *, min_tokens: int = 1) -> BlendedCorpus:
    """One dataset as the trainer opens it."""
    return open_corpus(Path(dataset.prefix), min_tokens=min_tokens, cache_dir=None)
