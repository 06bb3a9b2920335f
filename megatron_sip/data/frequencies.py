"""How often each token occurs in a dataset."""

from __future__ import annotations

import numpy as np

from megatron_sip.data.indexed_dataset import IndexedDataset

MAX_TOKENS = 2**24  # enough for the tokens that a candidate is made of; read in a second


def log_frequencies(dataset: IndexedDataset, *, max_tokens: int = MAX_TOKENS) -> np.ndarray:
    """Natural log of each token's share, each token counted once more than it occurs.

    Args:    max_tokens: of a larger dataset, evenly spaced documents are read until so many.
    Returns: float64[V], all finite; a function of the dataset and `max_tokens` alone.
    """
    manifest = dataset.manifest
    step = max(1, -(-manifest.tokens // max_tokens))
    count_V = np.ones(manifest.vocab_size, dtype=np.int64)
    left = max_tokens
    for i in range(0, dataset.num_documents, step):
        tokens = dataset.document(i)[:left]
        count_V += np.bincount(tokens, minlength=manifest.vocab_size)
        left -= len(tokens)
        if left <= 0:
            break
    return np.log(count_V / count_V.sum())
