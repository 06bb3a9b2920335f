"""What a model says when asked for a rewrite, reduced to the rewrite. Pure."""

from __future__ import annotations

import re

FENCES = (("<<<", ">>>"), ("```", "```"), ('"""', '"""'))
QUOTES = (('"', '"'), ("“", "”"), ("«", "»"))
_LABEL = re.compile(
    r"\A\W{0,3}(?:(?:sure|certainly|of course|okay)\b[^\n]{0,40}?)?"
    r"(?:here(?:['\u2019]s| is)\b[^\n:]{0,80}"
    r"|(?:the |a )?(?:(?:better|rewritten|improved|revised|corrected)\s+)*"
    r"(?:continuation|rewrite|version|text|answer))\W{0,3}:\W{0,3}\s",
    re.IGNORECASE,
)
_COMMENT = re.compile(
    r"\n\s*\n\W{0,3}(?:note\b|explanation\b|changes\b|i(?:['\u2019]ve| have) "
    r"|in this (?:version|rewrite)\b"
    r"|(?:this|the) (?:\w+ )?(?:continuation|rewrite|version)\b).*\Z",
    re.IGNORECASE | re.DOTALL,
)
_REFUSAL = re.compile(
    r"\A\W*(?:i['\u2019]?m (?:\w+ )?(?:sorry|unable)|i am (?:\w+ )?(?:sorry|unable)|sorry[,.]"
    r"|i (?:cannot|can['\u2019]t|can not|won['\u2019]t|will not) (?:\w+ )?"
    r"(?:help|assist|rewrite|write|provide|create|fulfill|comply|continue|generate)"
    r"|as an ai\b|i apologi[sz]e)",
    re.IGNORECASE,
)


def clean_rewrite(reply: str, *, suffix: str) -> str:
    """The rewrite in `reply`, spaced so that it continues the prefix as the suffix does.

    Marks, labels, comments and surrounding quotation marks go unless the suffix has them too;
    white space at the ends goes and runs of blank lines shrink to one.
    Returns: "" for a refusal or if nothing is left.
    """
    text, original = reply.strip(), suffix.strip()
    for opening, closing in FENCES:
        if text.startswith(opening) and not original.startswith(opening):
            text = text.removeprefix(opening).split(closing)[0].strip()
    if text != original:
        text = _without(_LABEL, text, original)
        text = _without(_COMMENT, text, original).strip()
        text = _unquoted(text, original)
        text = re.sub(r"\n\s*\n\s*\n+", "\n\n", text)
    if not text or (_REFUSAL.search(text) and not _REFUSAL.search(original)):
        return ""
    if text == original:
        return suffix
    leading = suffix[: len(suffix) - len(suffix.lstrip())]
    return leading + text


def _without(pattern: re.Pattern[str], text: str, original: str) -> str:
    return text if pattern.search(original) else pattern.sub("", text, count=1)


def _unquoted(text: str, original: str) -> str:
    for opening, closing in QUOTES:
        whole = len(text) > 1 and text.startswith(opening) and text.endswith(closing)
        if whole and opening not in text[1:-1] and not original.startswith(opening):
            return text[1:-1].strip()
    return text
