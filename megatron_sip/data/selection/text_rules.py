"""Choose documents by what can be counted in their text, and by the domain they come from.

Bounds are inclusive and all optional. The quantities are those of RedPajama-V2's signals of the
same meaning; the part of it that the paper trains its safety runs on is

    min_words = 50
    max_words = 100_000
    min_mean_word_length = 3
    max_mean_word_length = 10
    max_symbol_ratio = 0.1
    max_bullet_share = 0.9
    max_top_bigram_share = 0.2
    listed_words_file = "lists/curse_words.txt"     # LDNOOBW's list
    min_listed_words = 5
    domains_file = "lists/ut1_domains.txt"          # the UT1 blocklist
    domain_listed = true
    url_column = "url"                              # of PREFIX.documents.parquet

`text_measures` says how they are counted; unlike RedPajama-V2, we look up parent domains too.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from megatron_sip.config_base import NonNegative, NonNegativeInt, Section
from megatron_sip.data.selection.lists import (
    DomainList,
    WordList,
    load_domain_list,
    load_word_list,
)
from megatron_sip.data.selection.steps import Batch, Objection
from megatron_sip.data.selection.text_measures import TextMeasures, measure

_QUANTITIES = (
    "words", "mean_word_length", "symbol_ratio", "bullet_share", "top_bigram_share", "listed_words",
)  # fmt: skip


class TextRules(Section):
    """Bounds on what `measure` finds; None: no bound. Both bounds of a quantity are inclusive."""

    min_words: NonNegativeInt | None = None
    max_words: NonNegativeInt | None = None
    min_mean_word_length: NonNegative | None = None
    """Characters."""
    max_mean_word_length: NonNegative | None = None
    max_symbol_ratio: NonNegative | None = None
    """Symbols a word."""
    max_bullet_share: NonNegative | None = None
    max_top_bigram_share: NonNegative | None = None
    listed_words_file: str = ""
    """Words and phrases to count, one a line; the path is taken from the working directory."""
    min_listed_words: NonNegativeInt | None = None
    """Occurrences, not distinct words."""
    max_listed_words: NonNegativeInt | None = None
    domains_file: str = ""
    """Domains, one a line."""
    domain_listed: bool | None = None
    """Keep only documents whose domain is in the list (true) or is not in it (false)."""
    url_column: str = ""
    """Kept column of PREFIX.documents.parquet that holds the document's URL."""

    @model_validator(mode="after")
    def _consistent(self) -> TextRules:
        counts = self.min_listed_words is not None or self.max_listed_words is not None
        if counts != bool(self.listed_words_file):
            raise ValueError(
                f"listed_words_file is {self.listed_words_file!r}, min_listed_words "
                f"{self.min_listed_words} and max_listed_words {self.max_listed_words}; a bound "
                "needs the file and the file a bound"
            )
        domain = (self.domain_listed is not None, bool(self.domains_file), bool(self.url_column))
        if len(set(domain)) > 1:
            raise ValueError(
                f"domain_listed is {self.domain_listed}, domains_file {self.domains_file!r} and "
                f"url_column {self.url_column!r}; give all three or none"
            )
        for quantity in _QUANTITIES:
            low, high = _bounds(self, quantity)
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"min_{quantity} is {low}, but max_{quantity} is {high}: nothing can meet both"
                )
        if not self.model_dump(exclude_defaults=True):
            raise ValueError("no rule is given, so every document would stay; give at least one")
        return self


def load_rules(path: Path) -> TextRules:
    """Read a TOML file of rules.

    Raises: ValueError naming file, key, value and remedy if it is missing or not valid.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"rules {path} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"rules {path}: not valid TOML: {error}") from None
    try:
        return TextRules.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(e)) for e in error.errors(include_url=False)]
        raise ValueError(f"rules {path}:\n  " + "\n  ".join(lines)) from None


def broken_rules(
    measures: TextMeasures, rules: TextRules, *, domain_listed: bool | None = None
) -> tuple[str, ...]:
    """Names of the rules that a text breaks, empty: none.

    Args: domain_listed: whether the text's domain is in the list; None: unknown, which breaks the
          rule that it be listed, but not the rule that it be not.
    """
    broken = []
    for quantity in _QUANTITIES:
        value = getattr(measures, quantity)
        low, high = _bounds(rules, quantity)
        broken += [f"min_{quantity}"] if low is not None and value < low else []
        broken += [f"max_{quantity}"] if high is not None and value > high else []
    if rules.domain_listed is not None and bool(domain_listed) != rules.domain_listed:
        broken.append("domain_listed")
    return tuple(broken)


class TextRulesStep:
    """The rules as a step of a selection.

    Args:   rules: whose lists are read here.
    Raises: ValueError if a list cannot be read.
    """

    name = "text_rules"

    def __init__(self, rules: TextRules) -> None:
        self.rules = rules
        self.columns = (rules.url_column,) if rules.url_column else ()
        words, domains = rules.listed_words_file, rules.domains_file
        self._listed: WordList | None = load_word_list(Path(words)) if words else None
        self._domains: DomainList | None = load_domain_list(Path(domains)) if domains else None
        self._without_url = 0

    def describe(self) -> dict[str, Any]:
        """The rules that are set, and digests of the lists."""
        found = self.rules.model_dump(exclude_defaults=True)
        if self._listed:
            found["listed_words_sha256"] = self._listed.sha256
        if self._domains:
            found["domains_sha256"] = self._domains.sha256
        return found

    def objections(self, batch: Batch) -> Sequence[tuple[Objection, ...]]:
        """One objection for each broken rule."""
        urls = batch.columns[self.columns[0]] if self.columns else (None,) * len(batch)
        return [self._object(text, url) for text, url in zip(batch.texts, urls, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Documents without a URL, if URLs were asked for."""
        return {"without_url": self._without_url} if self._domains else {}

    def _object(self, text: str, url: str | None) -> tuple[Objection, ...]:
        listed = self._domains.lists(url) if self._domains else None
        self._without_url += int(self._domains is not None and listed is None)
        measures = measure(text, listed=self._listed)
        broken = broken_rules(measures, self.rules, domain_listed=listed)
        return tuple(Objection(rule, _detail(rule, measures, url)) for rule in broken)


def _detail(rule: str, measures: TextMeasures, url: str | None) -> str:
    if rule == "domain_listed":
        return f"url {url}"
    quantity = rule.partition("_")[2]
    return f"{quantity} {getattr(measures, quantity):.6g}"


def _bounds(rules: TextRules, quantity: str) -> tuple[float | None, float | None]:
    return getattr(rules, f"min_{quantity}", None), getattr(rules, f"max_{quantity}", None)


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, rule, remedy."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, TextRules.model_fields, n=1)
        remedy = (
            f'did you mean "{near[0]}"?' if near else f"keys: {', '.join(TextRules.model_fields)}"
        )
        return f"{key}: unknown key; {remedy}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{key} is {error['input']!r}: {error['msg']}"
