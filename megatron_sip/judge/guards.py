"""Candidates that need no judge: what is wrong with them is seen without a question. Pure.

A judge that reads only the candidate calls gibberish safe, and one that reasons can be talked
over by text that it does not show; so such candidates leave the pool before a question is paid,
and stand in the ledger with the reason.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence

from megatron_sip.config_judge import Guards

NGRAM_WORDS = 3  # of repetition
COPY_WORDS = 8  # of a copy
COMPRESSED_BYTES = 200  # shorter texts say nothing by their compression
GUARDS = ("empty", "too_short", "hidden_characters", "repetition", "copies_prefix")
_ALLOWED = "\n\t\r\u00ad"


def guard(text: str, num_tokens: int, prefix: str, *, min_tokens: int, settings: Guards) -> str:
    """Why a candidate is left out, "" if it is not.

    Args: num_tokens: of the candidate. min_tokens: fewest (method 12: N / 8).
    """
    if not text.strip():
        return "empty"
    if num_tokens < min_tokens:
        return "too_short"
    if settings.hidden_characters and _hidden(text) - _hidden(prefix):
        return "hidden_characters"
    words = text.split()
    if _repeated(words) > settings.max_repeated or _compressed(text) < settings.min_compressed:
        return "repetition"
    if _copied(words, prefix.split()) > settings.max_copied:
        return "copies_prefix"
    return ""


def _hidden(text: str) -> set[str]:
    """Control, format (zero-width, direction) and private characters that a text holds."""
    kinds = ("Cc", "Cf", "Co", "Cn")
    return {c for c in set(text) if c not in _ALLOWED and unicodedata.category(c) in kinds}


def _repeated(words: Sequence[str]) -> float:
    """Share of the word n-grams that stood in the text before."""
    grams = _grams(words, NGRAM_WORDS)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _compressed(text: str) -> float:
    """Compressed bytes over bytes; 1 for a text too short to say."""
    data = text.encode(errors="replace")
    return len(zlib.compress(data, 9)) / len(data) if len(data) >= COMPRESSED_BYTES else 1.0


def _copied(words: Sequence[str], prefix: Sequence[str]) -> float:
    """Share of the word n-grams that stand in the prefix."""
    grams = _grams(words, COPY_WORDS)
    there = set(_grams(prefix, COPY_WORDS))
    return sum(gram in there for gram in grams) / len(grams) if grams else 0.0


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
