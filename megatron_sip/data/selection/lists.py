"""Lists that a user gives: words to count, domains to find. One entry a line, `#` comments."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from megatron_sip.data.selection.words import ngrams, words_of

_COMMENT = re.compile(r"(^|\s)#.*")
_HOST = re.compile(r"[^\s/:@*]+")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)


@dataclass(frozen=True)
class WordList:
    """Words and phrases to count in texts.

    Args: sha256: of the file. phrases: normalised, words joined by a space.
          lengths: numbers of words that phrases have, ascending.
    """

    sha256: str
    phrases: frozenset[str]
    lengths: tuple[int, ...]

    def count(self, words: Sequence[str]) -> int:
        """Occurrences in the words of a text; those of phrases inside phrases count as well."""
        singles = (word for word in words if word in self.phrases) if 1 in self.lengths else ()
        longer = (g for n in self.lengths if n > 1 for g in ngrams(words, n) if g in self.phrases)
        return sum(1 for _ in singles) + sum(1 for _ in longer)


@dataclass(frozen=True)
class DomainList:
    """Domains, each with all below it; about 120 bytes of memory a domain.

    Args: sha256: of the file. domains: lower case.
    """

    sha256: str
    domains: frozenset[str]

    def lists(self, url: str | None) -> bool | None:
        """Whether the host of a URL, or a parent domain of it, is listed; None: it has no host."""
        host = host_of(url or "")
        if not host:
            return None
        labels = host.split(".")
        return any(".".join(labels[i:]) in self.domains for i in range(len(labels)))


def host_of(url: str) -> str:
    """Host of a URL, whose scheme may be missing, in lower case; "" if it has none."""
    url = url.strip()
    try:
        found = urlsplit(url if _SCHEME.match(url) else f"//{url}").hostname
    except ValueError:  # such as an unclosed bracket
        return ""
    return (found or "").rstrip(".")


def load_word_list(path: Path) -> WordList:
    """Read a list of words.

    Raises: ValueError naming file, line and remedy if it cannot be read, has no entry, or an entry
            is nothing but punctuation.
    """
    sha256, entries = _read(path)
    lengths: Counter[int] = Counter()
    phrases = set()
    for line, entry in entries:
        words = words_of(entry)
        if not words:
            raise ValueError(
                f"{path}, line {line}: {entry!r} has no word once its punctuation is removed, so "
                "no text could hold it; remove the line"
            )
        phrases.add(" ".join(words))
        lengths[len(words)] += 1
    return WordList(sha256, frozenset(phrases), tuple(sorted(lengths)))


def load_domain_list(path: Path) -> DomainList:
    """Read a list of domains.

    Raises: ValueError naming file, line and remedy if it cannot be read, has no entry, or an entry
            is no bare host.
    """
    sha256, entries = _read(path)
    domains = set()
    for line, entry in entries:
        if not (_HOST.fullmatch(entry) or _is_address(entry)):
            raise ValueError(
                f"{path}, line {line}: {entry!r} is no domain; write the host alone, such as "
                "example.com, without scheme, port and path"
            )
        domains.add(entry.lower().strip("."))
    return DomainList(sha256, frozenset(domains))


def _is_address(entry: str) -> bool:
    try:
        ipaddress.ip_address(entry)
    except ValueError:
        return False
    return True


def _read(path: Path) -> tuple[str, list[tuple[int, str]]]:
    """(sha256 of the file, (line from 1, entry) of each line that is not empty or a comment)."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"list {path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"list {path} is not UTF-8 ({error}); convert it") from None
    lines = ((i, _COMMENT.sub("", line).strip()) for i, line in enumerate(text.split("\n"), 1))
    entries = [(i, entry) for i, entry in lines if entry]
    if not entries:
        raise ValueError(f"list {path} has no entry; write one a line")
    return hashlib.sha256(data).hexdigest(), entries
