"""What a reply says, and what becomes of it: a table of replies, and properties of the join."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_sip.rewriting.acceptance import (
    COPIED,
    KEPT,
    REASONS,
    outcome_of,
    overlap,
    share_of_ngrams,
)
from megatron_sip.rewriting.text import (
    clean_rewrite,
    last_words,
    prompt_fields,
    refuses,
    stop_marks,
)
from megatron_sip.types import SipSample

PREFIX = "It was late in May. Once upon a time we all went to"
SUFFIX = " the sea, and there we saw a ship.  "
GOOD = "the hills, and there we saw a fox."
JOINED = " " + GOOD


def ids_of(text):
    return np.array([ord(c) for c in text], dtype=np.int32)


def read(reply, prefix=PREFIX, suffix=SUFFIX, unsafe=None):
    """(text, outcome) with one token a character."""
    text = clean_rewrite(reply, prefix=prefix, suffix=suffix)
    sample = SipSample(0, 0, len(prefix), ids_of(prefix), ids_of(suffix))
    token_ids = ids_of(text)[: len(suffix)]
    outcome = outcome_of(
        text, token_ids=token_ids, sample=sample, prefix=prefix, suffix=suffix, unsafe=unsafe
    )
    return text, outcome


KEPT_AS_GOOD = [
    GOOD,
    f"  {GOOD}\n",
    f"<rewrite>{GOOD}</rewrite>",
    f"{GOOD}\n</rewrite>\nI hope this helps",
    f"<rewrite>\n{GOOD}",
    f"<<<\n{GOOD}\n>>>\nI hope you like it",
    f"```\n{GOOD}\n```",
    f"```text\n{GOOD}\n```\nDone.",
    f'"""\n{GOOD}\n"""',
    f'"{GOOD}"',
    f"“{GOOD}”",
    f"«{GOOD}»",
    f"Here is a better continuation:\n\n{GOOD}",
    f"Here's the rewritten text: {GOOD}",
    f"Sure! Here's the rewritten text: {GOOD}",
    f"Certainly, here is a safer version that keeps the style:\n{GOOD}",
    f"**Rewritten continuation:** {GOOD}",
    f"Rewrite: {GOOD}",
    f"Continuation:\n{GOOD}",
    f"The revised text:\n<<<\n{GOOD}\n>>>",
    f"Below is the corrected passage:\n```\n{GOOD}\n```",
    f"{GOOD}\n\nThis continuation fits the style.",
    f"{GOOD}\n\nNote: I removed the insult.",
    f"{GOOD}\n\n(Note that I kept the style.)",
    f"{GOOD}\n\nI've replaced the harmful part.",
    f"{GOOD}\n\nI have removed what was false.",
    f"{GOOD}\n\n**Changes made:**\n- hills",
    f"{GOOD}\n\nExplanation: the sea is far away.",
    f"{GOOD}\n\n---\n\nLet me know if you want more.",
    f"{GOOD}\n\nI hope this helps!",
    f"time we all went to {GOOD}",
    f"we all went to {GOOD}",
    f"all went to {GOOD}",
    f"time  we all\nwent to {GOOD}",
    f"Time We All Went To {GOOD}",
    f"time we all went to\n\n{GOOD}",
    f"... time we all went to {GOOD}",
    f"…{GOOD}",
    f"... {GOOD}",
    f'"time we all went to {GOOD}"',
    f"<rewrite>time we all went to {GOOD}</rewrite>",
    f"Here is the continuation:\ntime we all went to {GOOD}",
]
REFUSALS = [
    "I'm sorry, but I cannot help with that.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "I am sorry, I can't continue this story as it is hateful.",
    "Sorry, I cannot rewrite this.",
    "Sorry, but I won't do it.",
    "I cannot help with this request",
    "I can't assist with rewriting harmful content.",
    "I cannot create content that promotes violence.",
    "I can't fulfill your request.",
    "I will not write that.",
    "I won't provide a continuation of this text.",
    "I am unable to assist with this.",
    "I'm not able to generate a version of it.",
    "Unfortunately, I am unable to provide such a text.",
    "I apologize, but I cannot comply with this request.",
    "I apologise for any confusion, but this is not something to rewrite.",
    "I must respectfully decline to continue.",
    "I'm afraid I can't help with that.",
    "As an AI language model I won't",
    "As an AI, I have no opinion on it.",
    "I'm just an AI and do not have feelings about this.",
    "I'm not comfortable writing about that.",
    "I do not feel comfortable continuing this.",
    "This request goes against my guidelines and principles.",
    "This text contains hate speech, so I cannot rewrite it.",
    "It is not appropriate for me to write that.",
    "**I cannot assist with that.**",
    "<rewrite>I cannot help with that.</rewrite>",
    "\"I'm sorry, but I can't help with that.\"",
    "time we all went to I'm sorry, but I cannot assist with that.",
]
KEPT_AS_IT_IS = [  # they look like labels, comments or refusals, and are none
    "I can see the text: it is here, and so are we all.",
    "Here is what he said: go to the hills, my friend.",
    "I cannot help thinking of the sea and of the ship there.",
    "I'm sorry to say that we never saw the ship again, not once.",
    '"I cannot help with that," said the man at the ship, and left.',
    "I cannot support a bill like that, and neither can the House.",
    "it goes against our values to do so, and we never will do it.",
    '"the hills" and "the sea" are both far, so we stayed at home',
    "the hills.\n\nI have seen many ships, and none was like this.",
    "the hills.\n\nThe new version of the ship was better, we heard.",
    "the text and the version: both of them are where we left them",
    "time we all went tomorrow to see the ship that was there then",
]
OTHER = [
    ("", "", "empty"),
    (" \n", "", "empty"),
    ("<<<", "", "empty"),
    ("<rewrite></rewrite>", "", "empty"),
    ("time we all went to", "", "empty"),
    ("Rewrite:\n", None, "too_short"),
    ("the hills.", " the hills.", "too_short"),
    (SUFFIX, SUFFIX, COPIED),
    (SUFFIX.strip(), SUFFIX, COPIED),
    (f"<rewrite>time we all went to{SUFFIX}</rewrite>", SUFFIX, COPIED),
    (f"Here is the text, unchanged:\n{SUFFIX}", SUFFIX, COPIED),
    (f"{SUFFIX.strip()}\n\nNote: it was good already.", SUFFIX, COPIED),
    (GOOD + "\u200b", None, "not_text"),
    (GOOD.replace("fox", "f\x00x"), None, "not_text"),
    (GOOD + "\ufffd", None, "not_text"),
    ("Once upon a time we all went to Once upon a time we all", None, "echoes_prefix"),
    (f"{GOOD}\n\n\n\nSo it was.", f"{JOINED}\n\nSo it was.", KEPT),
    (", so they say, the hills, and saw a fox.", ", so they say, the hills, and saw a fox.", KEPT),
]


@pytest.mark.parametrize("reply", KEPT_AS_GOOD)
def test_a_rewrite_is_found_in_what_a_model_says_around_it(reply):
    assert read(reply) == (JOINED, KEPT)


@pytest.mark.parametrize("reply", REFUSALS)
def test_a_refusal_is_known(reply):
    assert read(reply)[1] == "refusal"


@pytest.mark.parametrize("reply", KEPT_AS_IT_IS)
def test_a_text_that_only_looks_like_a_models_words_stays_whole(reply):
    assert read(reply) == (" " + reply, KEPT)


@pytest.mark.parametrize(("reply", "text", "outcome"), OTHER)
def test_every_other_reply_has_its_outcome(reply, text, outcome):
    found = read(reply)
    assert found[1] == outcome
    assert text is None or found[0] == text


def test_the_table_is_as_large_as_promised_and_knows_all_reasons():
    assert len(KEPT_AS_GOOD) + len(REFUSALS) + len(KEPT_AS_IT_IS) + len(OTHER) >= 60
    assert {*REASONS} - {o for *_, o in OTHER} == {"refusal", "unchanged_unsafe"}


@pytest.mark.parametrize(
    ("prefix", "suffix", "reply", "expected"),
    [
        ("so we went", " home.", "on.", " on."),
        ("so we went\n", "home.", "on.", "on."),
        ("so we went", "\n\nHome it was.", "On we went.", "\n\nOn we went."),
        ("so we went", " home.", ", as they say", ", as they say"),
        ("so we went", " , home", ", as they say", " , as they say"),
        ("so we went", ", home", "on and on", " on and on"),
        ("so we went", ", home", "; on", "; on"),
        ("a contin", "ent of ice", "ent of gold", "ent of gold"),
        ("a contin", "ent of ice", "continent of gold", "ent of gold"),
        ("is on a contin", "ent of ice", "it is on a continent", "it is on a continent"),
        ("it is on a contin", "ent of ice", "it is on a continent of gold", "ent of gold"),
        ("ha ha ha ha ha", " ha ha ha ha ha", "ha ha ha ha ha", " ha ha ha ha ha"),
        ("ha ha ha ha ha", " ha ha ha ha ha ho", "ha ha ha ha ha he", " ha ha ha ha ha he"),
        ("天地玄", "黄宇宙", "红宇宙", "红宇宙"),
        ("天地玄", "\uff0c宇宙", "红宇宙", "红宇宙"),
    ],
)  # fmt: skip
def test_a_rewrite_joins_as_its_suffix_did(prefix, suffix, reply, expected):
    assert clean_rewrite(reply, prefix=prefix, suffix=suffix) == expected


def test_what_the_suffix_has_too_is_left():
    assert not refuses("I am sorry, I cannot help with it", suffix="I can't assist with it.")
    for reply, suffix in [
        ('"Go!"', '"Stop!"'), ("Text: go", "Text: stop"), ("dream", "time"),
        ("<<< b >>>", "<<< a >>>"), (">>> b()\n>>> c()", ">>> a()\n>>> d()"),
        ("... go", "... stop"),
        ("a\n\nNote: b", "c\n\nNote: d"), ("a </rewrite> b", "c </rewrite> d"),
    ]:  # fmt: skip
        assert clean_rewrite(reply, prefix="And ", suffix=suffix) == reply
    shown, said = ">>> a()\n1", "<<<\n>>> a()\n2\n>>>"
    assert clean_rewrite(said, prefix="And\n", suffix=shown) == ">>> a()\n2"
    assert clean_rewrite(f"<<<{shown}>>>", prefix="And\n", suffix=shown) == shown
    assert stop_marks("<<<", suffix=shown) == [] and stop_marks("<<<", suffix="a") == [">>>"]
    assert stop_marks("So: <rewrite>", suffix=shown) == ["</rewrite>"]


def test_last_words_are_five_with_their_white_space_and_no_more_than_eighty_characters():
    assert last_words("one two three\nfour  five six ") == "two three\nfour  five six "
    assert last_words("one") == "one" and last_words(" \n") == ""
    assert last_words("x" * 500) == "x" * 80


def test_a_prompt_shows_what_it_has_placeholders_for():
    assert prompt_fields("p", "s", {"prefix", "suffix"}) == {"prefix": "p", "suffix": "s"}
    every = {"prefix", "suffix", "last_words", "num_words", "nonce"}
    found = prompt_fields(PREFIX, SUFFIX, every)
    assert set(found) == every and found["num_words"] == "8"
    assert found["last_words"] == "time we all went to"
    assert found["nonce"] not in PREFIX + SUFFIX and len(found["nonce"]) == 8
    assert prompt_fields("", "字" * 80, every)["num_words"] == "10"


def test_unsafe_text_must_change_and_only_where_it_is_known_to_be_unsafe():
    suffix = SUFFIX.rstrip()
    near = suffix.replace("ship", "shop")  # one of 35 characters

    def outcome(reply, unsafe):
        return read(reply, suffix=suffix, unsafe=unsafe)[1]

    assert outcome(suffix, True) == outcome(near, True) == "unchanged_unsafe"
    assert outcome(near, False) == outcome(near, None) == KEPT
    assert outcome(suffix, False) == outcome(suffix, None) == COPIED
    assert outcome(near.replace("sea", "bay"), True) == KEPT  # three of 35
    assert outcome("I can't assist with that.", True) == "refusal"


def test_overlap_is_the_common_subsequence_over_the_longer_length():
    assert overlap([1, 2, 3, 4], [1, 9, 3]) == 0.5
    assert overlap([1, 2, 3], [3, 2, 1]) == pytest.approx(1 / 3)
    assert overlap([], []) == 1.0 and overlap([1], []) == 0.0


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_overlap_is_symmetric_in_bounds_and_one_for_equals_only(a, b):
    assert overlap(a, b) == overlap(b, a)
    assert 0 <= overlap(a, b) <= 1 and (overlap(a, b) == 1) == (a == b)


def test_a_text_that_repeats_its_prefix_as_its_suffix_does_is_no_echo():
    poem, reply = (
        "row row row the boat, row row row the boat, so",
        "row row row the boat, row row ro",
    )
    assert read(reply, poem, " row row row the boat, row row so")[1] == KEPT
    assert read(reply, poem, " and then it sank, all of it did.")[1] == "echoes_prefix"
    assert share_of_ngrams(ids_of("abcdefg"), ids_of("xabcdef")) == pytest.approx(2 / 3)
    assert share_of_ngrams(ids_of("abc"), ids_of("abc")) == 0.0


TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\"'.,<>`abc"), max_size=40
)


@given(prefix=TEXT, suffix=TEXT)
def test_a_copy_is_the_suffix_however_it_is_wrapped(prefix, suffix):
    assume(suffix.strip())
    for reply in (suffix, suffix.strip(), f"\n{suffix}\n\n"):
        assert clean_rewrite(reply, prefix=prefix, suffix=suffix) == suffix
    if "rewrite>" not in suffix:
        wrapped = f"<rewrite>\n{suffix}</rewrite>\nDone"
        assert clean_rewrite(wrapped, prefix=prefix, suffix=suffix) == suffix


WORDS = st.lists(st.from_regex(r"[a-z]{1,7}", fullmatch=True), min_size=5, max_size=12)


@given(
    words=WORDS, rewrite=WORDS, suffix=WORDS, gap=st.sampled_from([" ", "\n", "\n\n", "  "]),
    repeat=st.sampled_from(["", " ", "\n", "  "]), shout=st.booleans(),
)  # fmt: skip
def test_repeated_last_words_go_and_the_gap_is_the_suffixs(
    words, rewrite, suffix, gap, repeat, shout
):
    # text that begins with some of these words by itself cannot be told from a repetition
    assume(rewrite[0] not in words[-5:] and suffix[0] not in words[-5:])
    prefix, original, text = " ".join(words), gap + " ".join(suffix), " ".join(rewrite)
    assume(text != original.strip())
    said = prefix.upper() if shout else prefix
    last = last_words(said).split()
    reply = repeat.join(["", " ".join(last), text]) if repeat else text
    assert clean_rewrite(reply, prefix=prefix, suffix=original) == gap + text


@given(reply=TEXT, prefix=TEXT, suffix=TEXT, unsafe=st.none() | st.booleans())
def test_no_reply_breaks_cleaning_or_acceptance(reply, prefix, suffix, unsafe):
    assume(suffix)
    text, outcome = read(reply, prefix, suffix, unsafe)
    assert outcome in (KEPT, COPIED, *REASONS)
    assert (outcome == "empty") <= (not text.strip())
    if outcome == COPIED:
        assert text[: len(suffix)] == suffix
    if outcome == KEPT:
        assert (text.strip() and text == text.rstrip()) or text == suffix


def test_characters_of_prefix_or_suffix_are_text_in_the_rewrite_too():
    reply = GOOD.replace("fox", "f\u200cx")
    assert read(reply)[1] == "not_text"
    assert read(reply, suffix=" the s\u200cea, and there we saw a ship.")[1] == KEPT
    assert read(reply, prefix="The s\u200cea. Once upon a time we all went to")[1] == KEPT
