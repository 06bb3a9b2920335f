"""The endless order of (prefix, suffix) samples: sample i is a function of (data, seed, i) alone.

Pass p over a part's E eligible documents is a keyed permutation of them, so every eligible document
comes once a pass; each time it is cut anew. No state: resuming is asking for the next i, at any
number of ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from megatron_sip.data.blended_corpus import BlendedCorpus
from megatron_sip.data.permutation import permute, unpermute
from megatron_sip.types import SipSample

CUT = "word start, 1"  # name of the rule by which documents are cut, for checkpoints


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from.

    Args: part: of the blend. number: of the pass over the part. document: in the part.
    """

    part: int
    number: int
    document: int


class PrefixSuffixSampler:
    """`sampler[i]` for i = 0, 1, 2, ... without end; `len` is not defined.

    The cut is uniform over the positions with at least min_prefix_tokens before and suffix_tokens
    after it at which a word starts; a document that has none is cut at any of these positions
    (looking for them all at the start would read every token). The end-of-document id is never in a
    suffix.

    Args:   corpus: where documents come from; eligible ones have min_prefix_tokens + suffix_tokens.
            prefix_tokens: longest prefix, the last tokens before the cut.
            min_prefix_tokens: shortest prefix. suffix_tokens: length of every suffix.
            seed: with i, the only source of randomness.
            word_starts: bool[V], `Tokenizer.word_starts`. eod: end-of-document id.
    Raises: ValueError if tokenizer and data disagree: another eod, or ids that it may not have.
    """

    def __init__(
        self,
        corpus: BlendedCorpus,
        *,
        prefix_tokens: int,
        min_prefix_tokens: int,
        suffix_tokens: int,
        seed: int,
        word_starts: np.ndarray,
        eod: int,
    ) -> None:
        for part in corpus.parts:
            if eod != part.eod or part.vocab_size > len(word_starts):  # its ids are all below
                raise ValueError(
                    f"{part.prefixes[0]} has eod {part.eod} and {part.vocab_size} pieces, but the "
                    f"tokenizer has eod {eod} and {len(word_starts)} pieces; give the tokenizer "
                    "that the data was made with, or adopt the data anew with it"
                )
        if not 0 < min_prefix_tokens <= prefix_tokens or suffix_tokens < 1:
            raise ValueError(
                f"data.min_prefix_tokens {min_prefix_tokens} must be in 1..data.prefix_tokens "
                f"{prefix_tokens}, data.suffix_tokens {suffix_tokens} at least 1"
            )
        shortest = min_prefix_tokens + suffix_tokens
        for part in corpus.parts:
            if part.min_tokens < shortest:
                raise ValueError(
                    f"{part.prefixes[0]} was opened for documents of {part.min_tokens} tokens; "
                    f"prefix and suffix need {shortest}"
                )
        self._corpus = corpus
        self._blend = corpus.blend
        self._prefix_tokens = prefix_tokens
        self._min_prefix_tokens = min_prefix_tokens
        self._suffix_tokens = suffix_tokens
        self._seed = seed
        self._word_starts = word_starts

    @property
    def num_eligible(self) -> int:
        """Documents of one pass over every part."""
        return self._corpus.num_eligible

    def origin(self, i: int) -> Origin:
        """Where sample i >= 0 comes from."""
        if i < 0:
            raise ValueError(f"sample {i}: the order starts at 0 and has no end")
        part, k = self._blend.locate(i)
        corpus = self._corpus.parts[part]
        number, position = divmod(k, corpus.num_eligible)
        place = permute(position, size=corpus.num_eligible, key=self._order_key(part, number))
        return Origin(part, number, corpus.eligible_document(place))

    def samples_of(self, part: int, document: int, *, last: int) -> list[int]:
        """Those of the samples before `last` that a document gives, in order.

        Raises: ValueError if there is no such document. A document that is not eligible gives none.
        """
        corpus = self._corpus.parts[part]
        place = corpus.place_of(document)
        if place is None:
            return []
        size = corpus.num_eligible
        passes = -(-self._blend.before(last)[part] // size)
        positions = (
            unpermute(place, size=size, key=self._order_key(part, n)) for n in range(passes)
        )
        found = (self._blend.index(part, n * size + p) for n, p in enumerate(positions))
        return [i for i in found if i < last]

    def __getitem__(self, i: int) -> SipSample:
        """Sample i >= 0: prefix int32[min_prefix_tokens..prefix_tokens], suffix int32[N]."""
        origin = self.origin(i)
        tokens = self._corpus.parts[origin.part].document(origin.document)  # int32[T]
        cut = self._cut(tokens, origin)
        return SipSample(
            sample_id=i,
            document_id=self._corpus.number_of(origin.part, origin.document),
            cut=cut,
            prefix_ids=tokens[max(0, cut - self._prefix_tokens) : cut].copy(),
            suffix_ids=tokens[cut : cut + self._suffix_tokens].copy(),
        )

    def _order_key(self, part: int, number: int) -> int:
        """Key of the permutation of a pass."""
        name = f"order {self._seed} {number}" + (f" part {part}" if part else "")
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def _cut(self, tokens: np.ndarray, origin: Origin) -> int:
        """Index of the first suffix token, uniform over the legal ones."""
        length = len(tokens) - int(self._corpus.parts[origin.part].append_eod)
        first, last = self._min_prefix_tokens, length - self._suffix_tokens  # both legal
        legal = np.flatnonzero(self._word_starts[tokens[first : last + 1]]) + first
        if not legal.size:
            legal = np.arange(first, last + 1)
        # Raw Philox words, since NumPy promises their stream but not that of `integers`.
        numbers = (self._seed, origin.number, origin.document)
        entropy = np.random.SeedSequence(numbers + ((origin.part,) if origin.part else ()))
        word = int(np.random.Philox(entropy).random_raw())
        return int(legal[word * legal.size >> 64])
