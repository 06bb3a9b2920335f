"""What can be counted in one text; pure.

The quantities are those of RedPajama-V2's signals of the same meaning, but: words are normalised to
NFKC, not NFD, and lose the punctuation of all scripts, not ASCII's alone; blank lines do not count;
"* " and "- " are bullets too; nothing is rounded.

Source: Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
2021 (rules for quality and repetition); Weber et al., "RedPajama", 2024 (signals).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_sip.data.selection.lists import WordList
from megatron_sip.data.selection.words import words_of

SYMBOLS = ("#", "...", "\u2026")
BULLETS = (*"\u2022\u2023\u25b6\u25c0\u25e6\u25a0\u25a1\u25aa\u25ab\u2013", "* ", "- ")
_PIECES = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class TextMeasures:
    """What can be counted in one text.

    Args: words: after normalisation. mean_word_length: characters, 0 without words.
          symbol_ratio: symbols ("#", "...", the ellipsis) for each word or run of punctuation.
          bullet_share: of the lines that are not blank, those that begin with a bullet.
          top_bigram_share: characters in all occurrences of the most frequent pair of words (of
          several the first) over the characters of all words; 0 if no pair occurs twice, and above
          1 where one overlaps itself. listed_words: occurrences.
    """

    words: int
    mean_word_length: float
    symbol_ratio: float
    bullet_share: float
    top_bigram_share: float
    listed_words: int


def measure(text: str, *, listed: WordList | None = None) -> TextMeasures:
    """Count what the rules bound.

    Args: listed: words to count; None: their count is 0.
    """
    words = words_of(text)
    characters = sum(map(len, words))
    pieces = sum(1 for _ in _PIECES.finditer(text))
    lines = [line.lstrip() for line in text.split("\n") if line.strip()]
    bullets = sum(f"{line} ".startswith(BULLETS) for line in lines)
    return TextMeasures(
        words=len(words),
        mean_word_length=characters / max(len(words), 1),
        symbol_ratio=sum(map(text.count, SYMBOLS)) / max(pieces, 1),
        bullet_share=bullets / max(len(lines), 1),
        top_bigram_share=_top_bigram_characters(words) / max(characters, 1),
        listed_words=listed.count(words) if listed else 0,
    )


def _top_bigram_characters(words: Sequence[str]) -> int:
    """Characters in all occurrences of the most frequent pair; 0 if none occurs twice."""
    pairs = Counter(pairwise(words)).most_common(1)
    if not pairs or pairs[0][1] < 2:
        return 0
    (first, second), count = pairs[0]
    return count * (len(first) + len(second))
