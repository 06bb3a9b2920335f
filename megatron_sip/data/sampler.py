"""The endless order of (prefix, suffix) samples: sample i is a function of (data, seed, i) alone.

Pass p of E eligible documents is a keyed permutation of them, so every eligible document comes
once a pass; each time it is cut anew. No state: resuming is asking for the next i.
"""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.permutation import permute
from megatron_sip.types import SipSample


class PrefixSuffixSampler:
    """`sampler[i]` for i = 0, 1, 2, ... without end; `len` is not defined.

    A document is eligible if, without its end-of-document id, it has at least
    min_prefix_tokens + suffix_tokens tokens. The cut is uniform over the positions with at least
    min_prefix_tokens before and suffix_tokens after it at which a word starts; a document that
    has none is cut at any of these positions (looking for them all at the start would read every
    token). The end-of-document id is never in a suffix.

    Args:   dataset: where documents come from.
            prefix_tokens: longest prefix, the last tokens before the cut.
            min_prefix_tokens: shortest prefix. suffix_tokens: length of every suffix.
            seed: with i, the only source of randomness.
            word_starts: bool[V], `Tokenizer.word_starts`. eod: end-of-document id.
    Raises: ValueError if no document is eligible or tokenizer and data disagree.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        *,
        prefix_tokens: int,
        min_prefix_tokens: int,
        suffix_tokens: int,
        seed: int,
        word_starts: np.ndarray,
        eod: int,
    ) -> None:
        manifest = dataset.manifest
        if (eod, len(word_starts)) != (manifest.eod, manifest.vocab_size):
            raise ValueError(
                f"{dataset.prefix} has eod {manifest.eod} and {manifest.vocab_size} pieces, but "
                f"the tokenizer has eod {eod} and {len(word_starts)} pieces; give the tokenizer "
                "that the data was made with"
            )
        if not 0 < min_prefix_tokens <= prefix_tokens or suffix_tokens < 1:
            raise ValueError(
                f"data.min_prefix_tokens {min_prefix_tokens} must be in 1..data.prefix_tokens "
                f"{prefix_tokens}, data.suffix_tokens {suffix_tokens} at least 1"
            )
        self._dataset = dataset
        self._prefix_tokens = prefix_tokens
        self._min_prefix_tokens = min_prefix_tokens
        self._suffix_tokens = suffix_tokens
        self._seed = seed
        self._word_starts = word_starts
        lengths = dataset.document_lengths() - int(manifest.append_eod)  # int64[documents]
        shortest = min_prefix_tokens + suffix_tokens
        self._eligible = np.flatnonzero(lengths >= shortest)  # int64[E]
        if not self._eligible.size:
            raise ValueError(
                f"{dataset.prefix}: none of {lengths.size} documents has "
                f"data.min_prefix_tokens + data.suffix_tokens = {min_prefix_tokens} + "
                f"{suffix_tokens} = {shortest} tokens, the longest has {lengths.max()}; lower "
                "these two or take longer documents"
            )

    @property
    def num_eligible(self) -> int:
        """E, documents of one pass."""
        return self._eligible.size

    def __getitem__(self, i: int) -> SipSample:
        """Sample i >= 0: prefix int32[min_prefix_tokens..prefix_tokens], suffix int32[N]."""
        if i < 0:
            raise ValueError(f"sample {i}: the order starts at 0 and has no end")
        number, position = divmod(i, self.num_eligible)
        key = hashlib.blake2b(f"order {self._seed} {number}".encode(), digest_size=8).digest()
        place = permute(position, size=self.num_eligible, key=int.from_bytes(key, "little"))
        document_id = int(self._eligible[place])
        tokens = self._dataset.document(document_id)  # int32[T]
        cut = self._cut(tokens, number=number, document_id=document_id)
        return SipSample(
            sample_id=i,
            document_id=document_id,
            cut=cut,
            prefix_ids=tokens[max(0, cut - self._prefix_tokens) : cut].copy(),
            suffix_ids=tokens[cut : cut + self._suffix_tokens].copy(),
        )

    def _cut(self, tokens: np.ndarray, *, number: int, document_id: int) -> int:
        """Index of the first suffix token, uniform over the legal ones."""
        length = len(tokens) - int(self._dataset.manifest.append_eod)
        first, last = self._min_prefix_tokens, length - self._suffix_tokens  # both legal
        legal = np.flatnonzero(self._word_starts[tokens[first : last + 1]]) + first
        if not legal.size:
            legal = np.arange(first, last + 1)
        # Raw Philox words, since NumPy promises their stream but not that of `integers`.
        entropy = np.random.SeedSequence((self._seed, number, document_id))
        word = int(np.random.Philox(entropy).random_raw())
        return int(legal[word * legal.size >> 64])
