"""Planted leaks of evaluation texts are found whatever hides them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from selection_helpers import QUESTION, batch_of_texts

from megatron_sip.data.selection.contamination import (
    Contamination,
    EvaluationFile,
    index_texts,
    read_evaluation,
    shared_runs,
)
from megatron_sip.data.selection.steps import Objection
from megatron_sip.data.selection.words import words_of


def index_of(*texts: str) -> Any:
    found = [("e.jsonl", f"record {i}", text) for i, text in enumerate(texts, 1)]
    return index_texts(found, ngram_words=13, min_words=8)


def test_a_shared_run_of_thirteen_words_is_found_and_twelve_are_not() -> None:
    words = words_of(QUESTION)
    assert len(words) == 15
    index = index_of("nothing " * 20, QUESTION)
    run = " ".join(words[1:14])
    assert shared_runs(f"so {run} he said", index) == {"e.jsonl": ("record 2", run)}
    assert shared_runs(" ".join(words[1:13]), index) == {}
    assert shared_runs(" ".join([*words[:7], "x", *words[7:]]), index) == {}


@given(
    before=st.lists(st.sampled_from("abcdef"), max_size=20),
    start=st.integers(0, 2),
    joints=st.lists(st.sampled_from([" ", "\n", ", ", " -- ", "\u2014", "!? "]), min_size=13,
                    max_size=13),
    loud=st.booleans(),
)  # fmt: skip
def test_case_punctuation_and_white_space_hide_nothing(
    before: list[str], start: int, joints: list[str], loud: bool
) -> None:
    run = words_of(QUESTION)[start : start + 13]
    text = " ".join(before) + " " + "".join(w + j for w, j in zip(run, joints, strict=True)) + "end"
    found = shared_runs(text.upper() if loud else text, index_of(QUESTION))
    assert found["e.jsonl"][0] == "record 1" and len(found["e.jsonl"][1].split()) == 13


def test_short_evaluation_texts_are_looked_for_whole_or_told_as_too_short() -> None:
    eight, seven = "one two three four five six seven eight", "one two three four five six seven"
    index = index_of(eight, seven, QUESTION)
    assert (index.lengths, index.whole, index.too_short) == (
        (8, 13), 1, (("e.jsonl", "record 2"),),
    )  # fmt: skip
    assert shared_runs(f"zero {eight} nine", index) == {"e.jsonl": ("record 1", eight)}
    assert shared_runs(f"zero {seven} nine", index) == {}


def test_each_evaluation_file_that_shares_a_run_is_told(tmp_path: Path) -> None:
    other = "A quite different text of more than thirteen words that stands in another file alone."
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"q": "short"}) + "\n\n" + json.dumps({"q": QUESTION}) + "\n"
    )
    (tmp_path / "b.txt").write_text(other)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    step = Contamination([read_evaluation(path, text_key="q") for path in paths])
    found = step.objections(batch_of_texts(["fine", f"{other} {QUESTION}", QUESTION]))
    a = Objection(str(paths[0]), "record 3: " + " ".join(words_of(QUESTION)[:13]))
    b = Objection(str(paths[1]), "record 1: " + " ".join(words_of(other)[:13]))
    assert [set(objections) for objections in found] == [set(), {a, b}, {a}]
    assert step.facts() == {
        "evaluation_texts": 3, "matched_whole": 0, "too_short": 1,
        "too_short_first": [f"{paths[0]}, record 1"],
    }  # fmt: skip
    digests = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert step.describe() == {"ngram_words": 13, "min_words": 8, "files": digests}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("e.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2: no text at key 'text' (there: txt)"),
        ("e.jsonl", b'{"text": 3}\n', "line 1: no text at key 'text'"),
        ("e.jsonl", b"[1]\n", "line 1: no text at key 'text' (there: list)"),
        ("e.jsonl", b'{"text": "a"}\n{\n', "line 2: not JSON"),
        ("e.jsonl", b"\n", "has no record"),
        ("e.txt", b"\xff", "is not UTF-8"),
        ("e.csv", b"a", "must end in .jsonl or .txt"),
    ],
)
def test_wrong_evaluation_files_are_told(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_evaluation(tmp_path / name, text_key="text")
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("words", [1, 7, 8])
def test_short_runs_are_looked_for_and_no_text_is_looked_for_whole(words: int) -> None:
    short, long = " ".join(f"w{i}" for i in range(words - 1)), " ".join("abcdefghij"[:words])
    step = Contamination([EvaluationFile("e", "", ((1, short), (2, long)))], ngram_words=words)
    assert step.describe() == {"ngram_words": words, "min_words": words, "files": {"e": ""}}
    assert step.facts()["matched_whole"] == 0 and step.facts()["too_short"] == 1
    found = step.objections(batch_of_texts([f"x {long} y", f"x {short} y"]))
    assert [len(objections) for objections in found] == [1, 0]


def test_nothing_to_look_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.txt cannot be read"):
        read_evaluation(tmp_path / "absent.txt", text_key="text")
    with pytest.raises(ValueError, match="no evaluation file is given"):
        Contamination([])
    with pytest.raises(ValueError, match="none of the 1 evaluation texts has 8 words"):
        Contamination([EvaluationFile("e", "", ((1, "too short"),))])
    with pytest.raises(ValueError, match="--ngram-words is 0, but a run has 1 word or more"):
        Contamination([EvaluationFile("e", "", ((1, QUESTION),))], ngram_words=0)
    for wrong in ({"min_words": 14}, {"min_words": 0}):
        with pytest.raises(ValueError, match="1 <= min_words <= ngram_words"):
            Contamination([EvaluationFile("e", "", ((1, QUESTION),))], **wrong)
