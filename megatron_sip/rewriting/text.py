"""Words between a sample and its rewriter: what a prompt shows, and what a reply says. Pure.

A reply is reduced to the rewrite in it and joined to the prefix as the suffix was. What the suffix
has too (a label, a mark, quotation marks) is never taken for the model's own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from megatron_sip.judge.criteria import nonce
from megatron_sip.rewriting.phrases import COMMENT, LABEL, is_refusal

LAST_WORDS = 5
FEWEST_REPEATED = 3  # of them, in a reply that repeats them; fewer may be the rewrite's own
LAST_CHARACTERS = 80
"""Longest `last_words`; a text without spaces is one word."""
CHARACTERS_PER_WORD = 8
MARKS = (("<<<", ">>>"), ("<rewrite>", "</rewrite>"))
"""Marks that a prompt may put around a rewrite; ours have the first."""
FENCES = (("```", "```"), ('"""', '"""'))
QUOTES = (('"', '"'), ("“", "”"), ("«", "»"))
_CLOSING = frozenset(",.;:!?)]}%\u2019”»…")


def last_words(prefix: str) -> str:
    """The last five words of a text, with the white space between and after them."""
    words = list(re.finditer(r"\S+", prefix))[-LAST_WORDS:]
    return prefix[words[0].start() :][-LAST_CHARACTERS:] if words else ""


def prompt_fields(prefix: str, suffix: str, placeholders: Collection[str]) -> dict[str, str]:
    """Text of each placeholder of a rewriter's prompt.

    Args: prefix: what the rewriter may see of it. placeholders: of the prompt.
    """
    words = max(len(suffix.split()), len(suffix) // CHARACTERS_PER_WORD, 1)
    fields = {"prefix": prefix, "suffix": suffix, "last_words": last_words(prefix)}
    fields["num_words"] = str(words)
    shown = {name: fields[name] for name in sorted(placeholders) if name != "nonce"}
    if "nonce" in placeholders:
        shown["nonce"] = nonce(prefix, avoid=tuple(shown.values()))
    return shown


def stop_marks(answer: str, *, suffix: str) -> list[str]:
    """What ends a rewrite whose prompt begins the answer with `answer`; no mark that the suffix
    has, since a copy would end there."""
    return [
        closing for opening, closing in MARKS if answer.endswith(opening) and closing not in suffix
    ]


def clean_rewrite(reply: str, *, prefix: str, suffix: str) -> str:
    """The rewrite in `reply`, spaced so that it continues `prefix` as `suffix` does.

    Marks, labels, comments, surrounding quotation marks and repeated last words of the prefix go;
    white space at the ends goes and runs of blank lines shrink to one. A refusal stays as it is.

    Returns: `suffix` itself, white space included, if that is what the reply says; "" if nothing
             is left.
    """
    text, original = reply.strip(), suffix.strip()
    if text != original:
        if not text.startswith(tuple(opening for opening, _ in MARKS)):
            text = _without(LABEL, text, original)
        text = _without(LABEL, _unmarked(text, original), original).strip()
    if text != original:
        text = _without(COMMENT, text, original).strip()
        text = _unquoted(text, original)
        text = _without_prefix(text, prefix, suffix)
        text = text if text == original else re.sub(r"\n\s*\n\s*\n+", "\n\n", text)
    if not text:
        return ""
    return suffix if text == original else _joined(text, prefix, suffix)


def refuses(text: str, *, suffix: str) -> bool:
    """Whether a cleaned rewrite is an assistant's refusal; never if the suffix reads like one."""
    return is_refusal(text) and not is_refusal(suffix)


def _without(pattern: re.Pattern[str], text: str, original: str) -> str:
    return text if pattern.search(original) else pattern.sub("", text, count=1)


def _unmarked(text: str, original: str) -> str:
    """Without marks around the whole, and what a model wrote after the closing one."""
    text = text.strip()
    for opening, closing in MARKS:
        if opening not in original:
            text = text.removeprefix(opening)
        if closing not in original:
            text = text.split(closing)[0]
        elif not original.endswith(closing):
            text = text.removesuffix(closing)
    for opening, closing in FENCES:
        if text.strip().startswith(opening) and not original.startswith(opening):
            inside = text.strip().removeprefix(opening).split(closing)[0]
            text = re.sub(r"\A[a-z]{1,10}\n", "", inside) if opening == "```" else inside
    return text.strip()


def _unquoted(text: str, original: str) -> str:
    for opening, closing in QUOTES:
        whole = len(text) > 1 and text.startswith(opening) and text.endswith(closing)
        if whole and opening not in text[1:-1] and not original.startswith(opening):
            return text[1:-1].strip()
    return text


def _without_prefix(text: str, prefix: str, suffix: str) -> str:
    """Without dots, last words, or the beginning of a parted word, if the text repeats them."""
    original = suffix.strip()
    if not original.startswith((".", "…")):
        text = re.sub(r"\A(?:\.{3,}|…)\s*", "", text)
    words = last_words(prefix).split()
    parted = _is_word(prefix[-1:]) and _is_word(suffix[:1])
    fewest = max(1, min(FEWEST_REPEATED, len(words)))
    for number in range(len(words), fewest - 1, -1):
        pattern = re.compile(r"\s+".join(map(re.escape, words[-number:])), re.IGNORECASE)
        if not (found := pattern.match(text)):
            continue
        rest = text[found.end() :]
        is_longer_word = not parted and _is_word(prefix[-1:]) and _is_word(rest[:1])
        own = pattern.match(original) is not None and not pattern.match(rest.lstrip())
        return text if is_longer_word or own else rest.strip()
    if parted and (half := re.search(r"\w{2,}\Z", prefix)):
        half = re.compile(re.escape(half.group()), re.IGNORECASE)
        found = half.match(text)
        if found and _is_word(text[found.end() : found.end() + 1]) and not half.match(original):
            return text[found.end() :]
    return text


def _joined(text: str, prefix: str, suffix: str) -> str:
    """`text` after the white space that parts prefix and suffix.

    One space goes before a comma and the like, and comes before a word where the suffix began with
    punctuation right after a word.
    """
    original = suffix.lstrip()
    leading = suffix[: len(suffix) - len(original)]
    if leading == " " and text[0] in _CLOSING and original[:1] not in _CLOSING:
        return text
    if not leading and _is_spaced(prefix[-1:]) and _is_spaced(text[0]) and not _is_word(suffix[:1]):
        return " " + text
    return leading + text


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_spaced(character: str) -> bool:
    """Whether it is of a word, in a script that parts words by spaces."""
    return _is_word(character) and unicodedata.east_asian_width(character) not in "WF"
