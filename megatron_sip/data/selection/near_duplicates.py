"""Keep the first of each group of near duplicates: MinHash signatures, found by LSH.

A document leaves if an earlier one that stayed resembles it: the share of equal places in their
signatures, which estimates the Jaccard similarity of their sets of word 5-grams (standard error
sqrt(J (1 - J) / 128), 0.035 at 0.8), reaches the threshold. So each document that left has a
document that stayed beside it, and a chain of ever less similar copies is cut where it has moved
too far. LSH only finds whom to compare: a pair at exactly the threshold is overlooked with
probability below MAX_MISS, a closer pair less often.

A document that stays costs about 6 kB of memory (measured at threshold 0.8: 512 bytes of signature,
the rest datasketch's tables), one that leaves nothing: 10 million need 60 GB. A larger dataset has
to be selected from in parts. The result depends on the documents, their order and the seed.

Source: Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", chapter 3. Signatures and tables: the library datasketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasketch
import numpy as np
import xxhash

from megatron_sip.data.selection.steps import Batch, Objection
from megatron_sip.data.selection.words import ngrams, words_of

MAX_MISS = 0.1
_SCHEME = "affine32"  # of datasketch: bijections of 32-bit hashes
_CHUNK = 1 << 14  # shingles; times permutations 32-bit numbers in memory


class NearDuplicates:
    """The step of a selection.

    Args:   seed: of hashes and permutations, in [0, 2**32). threshold: least estimated similarity
            of near duplicates, in (0, 1]. num_permutations: places of a signature, at least 2.
            shingle_words: words of a shingle; a shorter text is one shingle.
    Raises: ValueError naming an argument outside its range.
    """

    name = "near_duplicates"
    columns: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        seed: int,
        threshold: float = 0.8,
        num_permutations: int = 128,
        shingle_words: int = 5,
    ) -> None:
        _check("seed", seed, 0 <= seed < 2**32, "in [0, 2**32)")
        _check("threshold", threshold, 0 < threshold <= 1, "above 0 and at most 1")
        _check("num_permutations", num_permutations, num_permutations >= 2, "at least 2")
        _check("shingle_words", shingle_words, shingle_words >= 1, "at least 1")
        self.seed, self.threshold = seed, threshold
        self.num_permutations, self.shingle_words = num_permutations, shingle_words
        self._bands, self._rows = bands_and_rows(threshold, num_permutations=num_permutations)
        self._empty = datasketch.MinHash(num_permutations, seed=seed, hashfunc=int, scheme=_SCHEME)
        self._tables = datasketch.MinHashLSH(
            num_perm=num_permutations,
            params=(self._bands, self._rows),
            hashfunc=xxhash.xxh3_64_digest,
        )
        self._signatures = np.empty((1024, num_permutations), np.uint32)
        self._kept: list[int] = []
        self._last = -1

    def describe(self) -> dict[str, Any]:
        """All settings, those of the tables included."""
        return {
            "threshold": self.threshold,
            "num_permutations": self.num_permutations,
            "shingle_words": self.shingle_words,
            "seed": self.seed,
            "bands": self._bands,
            "rows_per_band": self._rows,
            "datasketch": datasketch.__version__,
        }

    def objections(self, batch: Batch) -> Sequence[tuple[Objection, ...]]:
        """One objection if a document of a smaller number that stayed resembles this one.

        The order inside the batch does not matter.

        Raises: ValueError if a document does not come after those of earlier batches.
        """
        found: list[tuple[Objection, ...]] = [()] * len(batch)
        for place in np.argsort(batch.numbers, kind="stable"):
            found[place] = self._object(int(batch.numbers[place]), batch.texts[place])
        return found

    def facts(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def _object(self, number: int, text: str) -> tuple[Objection, ...]:
        if number <= self._last:
            raise ValueError(
                f"near_duplicates: document {number} came after {self._last}; the step serves one "
                "pass over one dataset in document order: make a new one"
            )
        self._last = number
        signature = self._signature(text)
        near = self._nearest(signature)
        if near is not None:
            similarity, original = near
            detail = f"resembles document {original}, Jaccard similarity about {similarity:.2f}"
            return (Objection("near_duplicate", detail),)
        self._keep(number, signature)
        return ()

    def _signature(self, text: str) -> datasketch.MinHash:
        signature = self._empty.copy()
        hashes = sorted(shingle_hashes(text, n=self.shingle_words, seed=self.seed))
        for i in range(0, len(hashes), _CHUNK):
            signature.update_batch(hashes[i : i + _CHUNK])
        return signature

    def _nearest(self, signature: datasketch.MinHash) -> tuple[float, int] | None:
        """(estimated similarity, document) of the most similar that stayed, of several the first;
        None if none reaches the threshold."""
        found: list[Any] = self._tables.query(signature)
        rows: list[int] = sorted(found)
        if not rows:
            return None
        equal = self._signatures[rows] == signature.hashvalues
        similarities = equal.mean(axis=1)
        best = int(similarities.argmax())
        if similarities[best] < self.threshold:
            return None
        return float(similarities[best]), self._kept[rows[best]]

    def _keep(self, number: int, signature: datasketch.MinHash) -> None:
        row = len(self._kept)
        if row == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[row] = signature.hashvalues
        self._tables.insert(row, signature, check_duplication=False)
        self._kept.append(number)


def shingle_hashes(text: str, *, n: int, seed: int) -> set[int]:
    """Hashes in [0, 2**32) of the runs of n words; of the whole text if it has fewer; none if it
    has no word."""
    words = words_of(text)
    shingles = ngrams(words, min(n, max(len(words), 1)))
    return {xxhash.xxh32_intdigest(shingle.encode(), seed) for shingle in shingles}


def bands_and_rows(threshold: float, *, num_permutations: int) -> tuple[int, int]:
    """The most rows a band for which LSH rarely overlooks a pair at the threshold.

    A pair of similarity J meets in at least one of b bands of r rows with probability
    1 - (1 - J^r)^b. More rows mean fewer comparisons for nothing, and fewer bands to store.

    Returns: (b, r), at least two bands, with (1 - J^r)^b <= MAX_MISS where any r allows it.
    """
    for rows in range(num_permutations // 2, 0, -1):
        bands = num_permutations // rows
        if (1 - threshold**rows) ** bands <= MAX_MISS:
            return bands, rows
    return num_permutations, 1


def _check(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"near_duplicates: {name} is {value}; it must be {rule}")
