"""Which rewrites may be candidates; every other has a reason, and reasons are counted. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from megatron_sip.rewriting.text import refuses
from megatron_sip.types import SipSample

RULES = 1
"""Version of cleaning and acceptance: what a stored reply becomes."""
KEPT, COPIED = "kept", "copied"
REASONS = ("refusal", "empty", "not_text", "too_short", "unchanged_unsafe", "echoes_prefix")
"""Why a rewrite that was given is dropped, in the order in which they are looked for."""
FAILED = "failed"
"""No reply came."""
UNCHANGED_OVERLAP = 0.95
ECHO_NGRAM = 5
ECHO_SHARE = 0.5
ECHO_PREFIX_TOKENS = 512
_PLAIN_CONTROLS = frozenset("\n\t\r")


def outcome_of(
    text: str,
    *,
    token_ids: np.ndarray,
    sample: SipSample,
    prefix: str,
    suffix: str,
    unsafe: bool | None,
) -> str:
    """What becomes of a rewrite: KEPT, COPIED or one of REASONS.

    refusal: the model will not. empty: nothing is left of the reply. not_text: control, format or
    zero-width characters that neither prefix nor suffix has. too_short: fewer than N / 2 tokens.
    unchanged_unsafe: more than 95 % overlap with a suffix that is known to be unsafe.
    echoes_prefix: more than half of its 5-grams of tokens stand in the last 512 tokens of the
    prefix, and no more than half of the suffix's do.

    Args: text: cleaned, before the cut. token_ids: int32[<= N], the rewrite as it would be trained
          on. prefix, suffix: text of the sample. unsafe: whether the suffix is; None: not known.
    """
    length = len(sample.suffix_ids)
    copied = np.array_equal(token_ids, sample.suffix_ids)
    if refuses(text, suffix=suffix):
        return "refusal"
    if not text.strip():
        return "empty"
    if _odd_characters(text) - _odd_characters(prefix) - _odd_characters(suffix):
        return "not_text"
    if 2 * len(token_ids) < length:
        return "too_short"
    if unsafe and overlap(token_ids.tolist(), sample.suffix_ids.tolist()) > UNCHANGED_OVERLAP:
        return "unchanged_unsafe"
    if copied:
        return COPIED
    near = sample.prefix_ids[-ECHO_PREFIX_TOKENS:]
    if share_of_ngrams(token_ids, near) > ECHO_SHARE >= share_of_ngrams(sample.suffix_ids, near):
        return "echoes_prefix"
    return KEPT


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Longest common subsequence over the longer length, in [0, 1]; 1 for two empty ones.

    Args: a, b: token ids; time is the product of their lengths.
    """
    if not a or not b:
        return float(len(a) == len(b))
    row = [0] * (len(b) + 1)  # longest common subsequence of what was read of a, and b[:j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1] / max(len(a), len(b))


def share_of_ngrams(ids: np.ndarray, of: np.ndarray, *, size: int = ECHO_NGRAM) -> float:
    """Share of the n-grams of `ids` that stand in `of`, in [0, 1]; 0 if `ids` has none."""
    found, known = _ngrams(ids, size), set(_ngrams(of, size))
    return sum(gram in known for gram in found) / len(found) if found else 0.0


def _ngrams(ids: np.ndarray, size: int) -> list[tuple[int, ...]]:
    tokens = ids.tolist()
    return list(zip(*(tokens[i:] for i in range(size)), strict=False))


def _odd_characters(text: str) -> set[str]:
    """Characters that are no text: control, format (zero-width), private, unassigned, U+FFFD."""
    odd = {c for c in set(text) if unicodedata.category(c).startswith("C") or c == "\ufffd"}
    return odd - _PLAIN_CONTROLS
