"""How often pairs of adjacent tokens occur in a dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sip.data.blended_corpus import BlendedCorpus

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

        Args:    token_ids: int[T]; ids from vocab_size on, which a model may know, are in no pair.
        Returns: float64[max(T - 1, 0)].
        """
        ids = np.asarray(token_ids)
        wanted = _codes(ids, self.vocab_size)
        place = np.minimum(np.searchsorted(self.codes, wanted), len(self.codes) - 1)
        is_there = (self.codes[place] == wanted) & (ids[1:] < self.vocab_size)
        found = np.where(is_there, self.counts[place], 0)
        return found / self.counts.sum()


def pair_frequencies(corpus: BlendedCorpus, *, max_tokens: int = MAX_TOKENS) -> PairFrequencies:
    """Count the pairs inside documents.

    Args:    max_tokens: of larger data, evenly spaced documents are read until so many.
    Returns: counts that are a function of the data and `max_tokens` alone.
    """
    vocab_size = corpus.parts[0].vocab_size
    step = max(1, -(-corpus.tokens // max_tokens))
    documents = (p.document(i) for p in corpus.parts for i in range(0, p.num_documents, step))
    pieces, left = [], max_tokens
    for document in documents:
        tokens = document[:left]
        pieces.append(_codes(tokens, vocab_size))
        left -= len(tokens)
        if left <= 0:
            break
    codes, counts = np.unique(np.concatenate(pieces), return_counts=True)
    return PairFrequencies(codes, counts, vocab_size)


def _codes(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """int64[T - 1]: one number for each adjacent pair."""
    return token_ids[:-1].astype(np.int64) * vocab_size + token_ids[1:]
