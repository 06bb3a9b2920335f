"""Rules about a text: each measure counted by hand, every bound at both sides."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from selection_helpers import batch_of_texts, domain_rules

from megatron_sip.data.selection.lists import host_of, load_domain_list, load_word_list
from megatron_sip.data.selection.steps import Objection
from megatron_sip.data.selection.text_measures import measure
from megatron_sip.data.selection.text_rules import (
    TextRules,
    TextRulesStep,
    broken_rules,
    load_rules,
)
from megatron_sip.data.selection.words import ngrams, words_of

# --- words ---------------------------------------------------------------------------------------


def test_words_are_lower_case_without_punctuation_and_dashes_part_them() -> None:
    assert words_of("Don't STOP\u2014well-known, \u201cfine\u201d--really?!\n\tYes\u2026") == [
        "dont", "stop", "wellknown", "fine", "really", "yes",
    ]  # fmt: skip
    assert words_of("\ufb01nd \uff21 cafe\u0301") == ["find", "a", "caf\u00e9"]
    assert words_of("$5 + <b> \U0001f595") == ["5", "b", "\U0001f595"]
    assert words_of("... \ud83d -- !") == []


def test_ngrams_are_the_runs_of_n_words() -> None:
    assert list(ngrams(["a", "b", "c"], 2)) == ["a b", "b c"]
    assert list(ngrams(["a", "b", "c"], 3)) == ["a b c"]
    assert list(ngrams(["a", "b", "c"], 4)) == []


# --- measures, each against a value counted by hand ----------------------------------------------


def test_measures_of_a_text_counted_by_hand(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("Darn\nholy smoke\n")
    text = "\u2022 Darn it, darn it!\n\n  - holy SMOKE... #1\nplain - line\n*bold* \u2026"
    found = measure(text, listed=load_word_list(tmp_path / "list"))
    # darn it darn it holy smoke 1 plain line bold: 10 words, 4+2+4+2+4+5+1+5+4+4 = 35 characters
    assert (found.words, found.mean_word_length) == (10, 3.5)
    # pieces: bullet Darn it , darn it ! - holy SMOKE "... " # 1 plain - line * bold * ellipsis
    assert found.symbol_ratio == 3 / 20
    assert found.bullet_share == 2 / 4
    assert found.top_bigram_share == 2 * 6 / 35  # "darn it", twice
    assert found.listed_words == 3


def test_measures_of_no_text_are_zero() -> None:
    for text in ("", " \n\n", "!!"):
        found = measure(text)
        assert (found.words, found.mean_word_length, found.top_bigram_share) == (0, 0, 0)
        assert (found.symbol_ratio, found.bullet_share, found.listed_words) == (0, 0, 0)


def test_a_pair_of_words_that_occurs_once_has_no_share_and_one_that_overlaps_itself_may_exceed_one(
) -> None:  # fmt: skip
    assert measure("one two three").top_bigram_share == 0
    assert measure("ab ab ab ab").top_bigram_share == 3 * 4 / 8


def test_listed_words_are_whole_words_in_any_case_and_phrases_are_runs(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("# a comment\n\nASS  # another\nson of a gun\n")
    listed = load_word_list(path)
    assert listed.phrases == {"ass", "son of a gun"} and listed.lengths == (1, 4)
    assert listed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for text, count in [
        ("class assess asses", 0), ("Ass, ass! ASS", 3), ("a Son of a gun's", 0),
        ("son, of a gun; son of a gun", 2), ("son of a", 0),
    ]:  # fmt: skip
        assert measure(text, listed=listed).listed_words == count, text


# --- rules, at both sides of every bound ---------------------------------------------------------

WORDS_4 = "abcd efgh ijkl mnop"  # 4 words of 4 letters, no pair twice
SIDES = [
    ({"min_words": 4}, WORDS_4, "abcd efgh ijkl"),
    ({"max_words": 4}, WORDS_4, WORDS_4 + " q"),
    ({"min_mean_word_length": 3}, "ab abcd", "ab abc"),
    ({"max_mean_word_length": 3}, "ab abcd", "abc abcd"),
    ({"max_symbol_ratio": 0.1}, "# b c d e f g h i j", "# b c d e f g h i"),
    ({"max_symbol_ratio": 0.1}, "a... c d e f g h i j", "a... c d e f g h i"),
    ({"max_symbol_ratio": 0.1}, "a\u2026 c d e f g h i j", "a\u2026 c d e f g h i"),
    ({"max_bullet_share": 0.5}, "\u2022 a\nb", "\u2022 a\n- b\nc"),
    ({"max_bullet_share": 0.5}, "* a\n-b", "* a\n-"),
    ({"max_top_bigram_share": 0.2}, "a b a b " + "c" * 16, "a b a b " + "c" * 15),
]


@pytest.mark.parametrize(("rules", "inside", "outside"), SIDES)
def test_a_text_at_the_bound_stays_and_one_beyond_it_leaves(
    rules: dict[str, float], inside: str, outside: str
) -> None:
    known = TextRules.model_validate(rules)
    assert broken_rules(measure(inside), known) == ()
    assert broken_rules(measure(outside), known) == tuple(rules)


def test_bounds_of_listed_words(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("darn\n")
    for key, inside, outside in [("min_listed_words", 5, 4), ("max_listed_words", 5, 6)]:
        rules = TextRules.model_validate({"listed_words_file": str(tmp_path / "list"), key: 5})
        step = TextRulesStep(rules)
        stays, leaves = step.objections(batch_of_texts(["darn " * inside, "darn " * outside]))
        assert stays == ()
        assert leaves == (Objection(key, f"listed_words {outside}"),)


def test_every_broken_rule_is_told_and_unset_rules_break_nothing() -> None:
    rules = TextRules(min_words=5, max_mean_word_length=3.5, max_words=10)
    assert broken_rules(measure(WORDS_4), rules) == ("min_words", "max_mean_word_length")
    assert broken_rules(measure("a " * 1000), TextRules(min_words=1000)) == ()


# --- domains -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://WWW.Example.com:8080/a?b=http://x.org", "www.example.com"),
        ("example.com/a://b", "example.com"), ("//example.com./", "example.com"),
        ("http://user@[::1]:80/", "::1"), ("", ""), ("https:///path", ""), ("http://[", ""),
    ],
)  # fmt: skip
def test_host_of_a_url(url: str, host: str) -> None:
    assert host_of(url) == host


def test_a_domain_is_listed_with_all_below_it(tmp_path: Path) -> None:
    urls = (
        "http://bad.example/x", "a.b.BAD.example", "http://verybad.example", "http://example",
        "http://10.0.0.7/", None, "", "http://intranet/x",
    )  # fmt: skip
    for listed, kept in [(True, [0, 1, 4, 7]), (False, [2, 3, 5, 6])]:
        step = TextRulesStep(domain_rules(tmp_path, listed=listed))
        found = step.objections(batch_of_texts(["text"] * len(urls), url=urls))
        assert [i for i, objections in enumerate(found) if not objections] == kept
        assert step.facts() == {"without_url": 2}


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_word = 3", 'min_word: unknown key; did you mean "min_words"?'),
        ("min_words = 3.5", "min_words is 3.5: Input should be a valid integer"),
        ("max_symbol_ratio = -1", "max_symbol_ratio is -1: "),
        ("min_words = 9\nmax_words = 8", "min_words is 9, but max_words is 8"),
        ("", "no rule is given"),
        ("listed_words_file = 'x'", "a bound needs the file and the file a bound"),
        ("min_listed_words = 5", "a bound needs the file and the file a bound"),
        ("domain_listed = true\nurl_column = 'url'", "give all three or none"),
        ("min_words =", "not valid TOML"),
    ],
)
def test_wrong_rules_are_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_rules(path)
    assert str(path) in str(error.value)


def test_rules_are_read_as_written_and_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("min_words = 50\nmax_symbol_ratio = 1\n")
    assert load_rules(tmp_path / "r.toml") == TextRules(min_words=50, max_symbol_ratio=1.0)
    with pytest.raises(ValueError, match=r"none\.toml cannot be read"):
        load_rules(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("load", "data", "message"),
    [
        (load_word_list, b"# only\n", "has no entry"),
        (load_word_list, b"fine\n--!\n", "line 2: '--!' has no word"),
        (load_word_list, b"\xff\xfe", "is not UTF-8"),
        (load_domain_list, b"a.example\nhttp://b.example\n", "line 2: 'http://b.example' is no"),
        (load_domain_list, b"*.example\n", "line 1"),
    ],
)
def test_wrong_lists_are_told(tmp_path: Path, load: Any, data: bytes, message: str) -> None:
    (tmp_path / "list").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path / "list")
    with pytest.raises(ValueError, match="absent cannot be read"):
        load(tmp_path / "absent")
