"""How often pairs of adjacent tokens occur in a dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sip.data.indexed_dataset import IndexedDataset

MAX_TOKENS = 2**24  # enough to know the common pairs; counted in seconds


@dataclass(frozen=True)
class PairFrequencies:
    """Counts of the distinct pairs of adjacent tokens.

    Args: codes: int64[U], first * vocab_size + second, ascending.
          counts: int64[U].
          vocab_size: of the tokenizer.
    """

    codes: np.ndarray
    counts: np.ndarray
    vocab_size: int

    def share(self, token_ids: np.ndarray) -> np.ndarray:
        """Share of each adjacent pair among all that were counted, 0 for one that was not.

        Args:    token_ids: int[T].
        Returns: float64[max(T - 1, 0)].
        """
        wanted = _codes(np.asarray(token_ids), self.vocab_size)
        place = np.minimum(np.searchsorted(self.codes, wanted), len(self.codes) - 1)
        found = np.where(self.codes[place] == wanted, self.counts[place], 0)
        return found / self.counts.sum()


def pair_frequencies(dataset: IndexedDataset, *, max_tokens: int = MAX_TOKENS) -> PairFrequencies:
    """Count the pairs inside documents.

    Args:    max_tokens: of a larger dataset, evenly spaced documents are read until so many.
    Returns: counts that are a function of the dataset and `max_tokens` alone.
    """
    manifest = dataset.manifest
    step = max(1, -(-manifest.tokens // max_tokens))
    parts, left = [], max_tokens
    for i in range(0, dataset.num_documents, step):
        tokens = dataset.document(i)[:left]
        parts.append(_codes(tokens, manifest.vocab_size))
        left -= len(tokens)
        if left <= 0:
            break
    codes, counts = np.unique(np.concatenate(parts), return_counts=True)
    return PairFrequencies(codes, counts, manifest.vocab_size)


def _codes(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """int64[T - 1]: one number for each adjacent pair."""
    return token_ids[:-1].astype(np.int64) * vocab_size + token_ids[1:]
