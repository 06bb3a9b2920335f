"""Words as all steps see them: lower case, no punctuation, parted by white space.

Scripts that part no words (Chinese, Thai) give one long "word" a clause; counts and n-grams of
words say little about them.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator, Sequence

_DASHES = "\u2013\u2014\u2015"


class _Letters(dict[int, int | str | None]):
    """`str.translate` table that is filled as characters occur."""

    def __missing__(self, code: int) -> int | str | None:
        character, category = chr(code), unicodedata.category(chr(code))
        if character in _DASHES:
            kept: int | str | None = " "
        elif character in string.punctuation or category[0] == "P" or category == "Cs":
            kept = None
        else:
            kept = code
        self[code] = kept
        return kept


_LETTERS = _Letters()


def words_of(text: str) -> list[str]:
    """Words of a text after NFKC and lower-casing.

    Dashes, also "--", part words; all other punctuation, and ASCII's symbols, vanish: "don't" is
    "dont", "well-known" is "wellknown". Half surrogate pairs, as JSON may hold them, vanish too.
    """
    plain = unicodedata.normalize("NFKC", text).lower().replace("--", " ")
    return plain.translate(_LETTERS).split()


def ngrams(words: Sequence[str], n: int) -> Iterator[str]:
    """Runs of n words in order, joined by a space; none if there are fewer words."""
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
