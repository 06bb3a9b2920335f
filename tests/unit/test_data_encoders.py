"""Fast tokenizer backends give the ids of the exact tokenizer; where one does not, it is found."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from test_data_preprocess_formats import (
    byte_level_bpe,
    lines,
    parts,
    preprocess,
    preprocess_here,
    read_texts,
)

from megatron_sip.data.preprocess import blocks, journal, pipeline, worker
from megatron_sip.data.preprocess.encoders import (
    CHECK_EVERY,
    Encoder,
    difference,
    encode_checked,
    fast_encoder,
)
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.tokenizer_training import train_tokenizer

TEXTS = [
    f"Speech {i}: the state of the union, isn't it?\nWe caf\u00e9 thank you" for i in range(50)
]
SNIPPETS = [
    "<|endoftext|>", "<|endoftext", "|>", "</s>", "<s>", "<unk>", "<0x41>", "\0", "\0\0", "\x07",
    "\u2581", "\u0120", "\ufeff", "\ufffd", "\uffff", "\U0010ffff", "\u2028", "\x85", "\xa0",
    "e\u0301", "\u0301", "\U0001f9d1\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u0e01\u0e33",
    "\uac00\u1100\u1161", "\u200b", "\u202e", "'s 'S 'LL 've", "3.14159 1,000,000 \u0663",
    "\u01c5\u00df", " ", "  ", "   \n\n \t\r\n", "a" * 300, " " * 300, "\n" * 300,
    "ab" * 150, "\u00e9" * 200,
    "the state of the union", "isn't", "caf\u00e9",
]  # fmt: skip
ANY_TEXT = st.lists(
    st.one_of(st.sampled_from(SNIPPETS), st.text(st.characters(exclude_categories=["Cs"]))),
    max_size=8,
).map("".join)


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    return byte_level_bpe(folder / "tokenizer.json", [*TEXTS, *SNIPPETS])


@pytest.fixture(scope="module")
def split_bpe(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> Path:
    """The same with the pattern that Llama 3 cuts words by."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    content = json.loads(bpe.read_text())
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] |= {"use_regex": False}
    pretokenizers = [cut, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pretokenizers}
    path = tmp_path_factory.mktemp("encoders") / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "t.model"
    train_tokenizer(iter(TEXTS), vocab_size=320, output=path)
    return path


@cache
def backend(path: Path) -> tuple[Encoder, Tokenizer]:
    tokenizer = Tokenizer.load(path)
    encoder, reason = fast_encoder(path)
    assert encoder is not None, reason
    return encoder, tokenizer


def ids_of(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text; checks that the counts add up."""
    ids, counts = encoder.encode(texts)
    assert len(counts) == len(texts) and counts.sum() == len(ids)
    ends = np.cumsum(counts)
    return [ids[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]


def assert_equal_to_exact(path: Path, texts: Sequence[str]) -> None:
    encoder, tokenizer = backend(path)
    assert ids_of(encoder, texts) == [tokenizer.encode(text) for text in texts]
    assert difference(encode_checked(encoder, texts), tokenizer) is None


BATCH = st.lists(ANY_TEXT, max_size=5)


@needs("fastokens")
@hypothesis.settings(max_examples=300)
@given(texts=BATCH)
def test_fastokens_gives_the_exact_ids(bpe: Path, split_bpe: Path, texts: list[str]) -> None:
    assert_equal_to_exact(bpe, texts)
    assert_equal_to_exact(split_bpe, texts)


@needs("gigatoken")
@hypothesis.settings(max_examples=300)
@given(texts=BATCH)
def test_gigatoken_gives_the_exact_ids(piece: Path, texts: list[str]) -> None:
    assert_equal_to_exact(piece, texts)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bpe", marks=needs("fastokens")),
        pytest.param("split_bpe", marks=needs("fastokens")),
        pytest.param("piece", marks=needs("gigatoken")),
    ],
)
def test_each_snippet_alone_between_words_and_repeated(
    kind: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    for snippet in SNIPPETS:
        assert_equal_to_exact(path, [snippet, f"one{snippet}two", f" {snippet} ", snippet * 20])
    assert_equal_to_exact(path, [])
    assert_equal_to_exact(path, ["", "a", ""])
    assert_equal_to_exact(path, ["<|endoftext|>", "</s>"])  # none left for gigatoken
    assert_equal_to_exact(path, ["word " * 60_000, "x" * 100_000])


# A backend that is wrong


class Spoiled:
    """A backend that is wrong on one word."""

    name = "spoiled"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = [self._tokenizer.encode(text) for text in texts]
        for ids, text in zip(lists, texts, strict=True):
            if "spoiled" in text:
                ids[-1] ^= 1
            if "fatal" in text:
                raise RuntimeError("index out of bounds")
        return np.concatenate([np.array(ids, np.int64) for ids in lists]), np.array(
            [len(ids) for ids in lists]
        )


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker gets the spoiled backend; the proof before the run reads little."""
    monkeypatch.setattr(worker, "fast_encoder", lambda path: (Spoiled(Tokenizer.load(path)), ""))
    monkeypatch.setattr(pipeline, "_SAMPLE_CHARS", 1000)
    monkeypatch.setattr(pipeline, "_JOURNAL_S", 0.0)  # a journal after every block
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)


def spoiled_text(*, is_checked: bool) -> str:
    """A text with the word, whose digest says whether it is compared during the run."""
    texts = (f"This one is spoiled {i}." for i in range(100_000))
    return next(
        t for t in texts if (xxhash.xxh3_64_intdigest(t.encode()) % CHECK_EVERY == 0) == is_checked
    )


def run_both(
    folder: Path, tokenizer: Path, texts: Sequence[str], run: Callable[..., object]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """All parts, (with the backend, with the exact tokenizer)."""
    path = folder / "a.jsonl"
    path.write_bytes(lines(texts))
    for name, exact in (("fast", False), ("exact", True)):
        run([path], folder / name, tokenizer=tokenizer, exact=exact)
    return parts(folder / "fast"), parts(folder / "exact")


@pytest.mark.usefixtures("spoiled")
def test_a_difference_in_the_sample_leads_to_the_exact_tokenizer(
    tmp_path: Path, bpe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = spoiled_text(is_checked=False)
    fast, exact = run_both(tmp_path, bpe, [TEXTS[0], text, *TEXTS], preprocess_here)
    assert fast == exact
    assert f"the fast tokenizer is wrong on {text!r}: [" in caplog.text
    assert "beginning anew with the exact tokenizer" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.usefixtures("spoiled")
def test_a_difference_during_the_run_leads_to_the_exact_tokenizer(
    tmp_path: Path, bpe: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = journal.save
    monkeypatch.setattr(journal, "save", lambda *a, **k: (saved.append(a[1].cursor), save(*a, **k)))
    text = spoiled_text(is_checked=True)
    before = spoiled_text(is_checked=False)  # written wrong when the difference is found
    texts = [*TEXTS, before, *TEXTS, text, *TEXTS]
    fast, exact = run_both(tmp_path, bpe, texts, preprocess_here)
    assert fast == exact
    assert f"the fast tokenizer is wrong on {text!r}: [" in caplog.text
    assert len(caplog.records) == 1
    begins = [cursor.offset for cursor in saved].index(max(c.offset for c in saved))
    assert begins > 1 and saved[0] in saved[1:]  # it had come some way, and began anew


@pytest.mark.usefixtures("spoiled")
def test_a_backend_that_fails_on_a_text_leads_to_the_exact_tokenizer(
    tmp_path: Path, bpe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*TEXTS * 3, "This one is fatal.", *TEXTS]
    fast, exact = run_both(tmp_path, bpe, texts, preprocess_here)
    assert fast == exact
    assert "spoiled failed: index out of bounds; beginning anew with the exact" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("spoiled")
def test_a_difference_that_is_never_looked_at_would_be_in_the_bytes(
    tmp_path: Path, bpe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The spoiling spoils, or the two tests before could not fail."""
    texts = [*TEXTS, spoiled_text(is_checked=False), *TEXTS]
    fast, exact = run_both(tmp_path, bpe, texts, preprocess_here)
    assert fast[".bin"] != exact[".bin"] and fast[".idx"] == exact[".idx"]
    assert caplog.records == []


@pytest.mark.usefixtures("spoiled")
@pytest.mark.parametrize("asked_for", [True, False])
def test_a_run_goes_on_without_the_fast_backend_if_asked_to_or_it_was_wrong(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, asked_for: bool
) -> None:
    wrong = [spoiled_text(is_checked=False)]
    found = [] if asked_for else [spoiled_text(is_checked=True)]
    (tmp_path / "a.jsonl").write_bytes(lines([*TEXTS, *found, *TEXTS, *wrong]))
    settings = {"tokenizer": bpe, "exact": True}
    preprocess_here([tmp_path / "a.jsonl"], tmp_path / "exact", **settings)
    save = journal.save

    def save_then_stop(folder: Path, progress: journal.Progress, **options: Any) -> None:
        save(folder, progress, **options)
        if progress.exact != asked_for and progress.cursor.record > len(TEXTS) + len(found):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "save", save_then_stop)
        settings["exact"] = False
        preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", **settings)
    settings |= {"exact": asked_for, "resume": True}
    preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", **settings)
    assert parts(tmp_path / "d") == parts(tmp_path / "exact")


MODULE = """
import numpy, tokenizers

class Tokenizer:
    @staticmethod
    def from_file(path):
        return Tokenizer(path)

    def __init__(self, path):
        self._exact = tokenizers.Tokenizer.from_file(path)
        self._exact.encode_special_tokens = True

    def no_truncation(self):
        pass

    no_padding = no_truncation

    def encode_batch_flat(self, texts, *, split_special_tokens):
        assert split_special_tokens
        ids = [self._exact.encode(text, add_special_tokens=False).ids for text in texts]
        for found, text in zip(ids, texts):
            if "spoiled" in text:
                found[-1] ^= 1
        offsets = numpy.cumsum([0, *map(len, ids)], dtype="<u8")
        return numpy.array(sum(ids, []), "<u4").tobytes(), offsets.tobytes()
"""


@pytest.mark.parametrize("is_early", [True, False])
def test_worker_processes_find_a_wrong_backend_too(
    tmp_path: Path,
    bpe: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_early: bool,
) -> None:
    """A package `fastokens` that is wrong on one word, as spawned processes import it."""
    (tmp_path / "packages" / "fastokens-9.9.dist-info").mkdir(parents=True)
    (tmp_path / "packages" / "fastokens.py").write_text(MODULE)
    facts = tmp_path / "packages" / "fastokens-9.9.dist-info" / "METADATA"
    facts.write_text("Metadata-Version: 2.1\nName: fastokens\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    text = spoiled_text(is_checked=not is_early)
    many = [f"{i} {t}" for i in range(60) for t in TEXTS]  # more than the sample
    texts = [text, *many] if is_early else [*many, text]

    def run(*arguments: object, **settings: object) -> None:
        preprocess(*arguments, workers=2, **settings)

    fast, exact = run_both(tmp_path, bpe, texts, run)
    assert fast == exact
    assert f"the fast tokenizer is wrong on {text!r}: [" in caplog.text


# No backend


@pytest.mark.parametrize(
    ("kind", "name"), [("bpe", "fastokens"), ("piece", "gigatoken")], ids=["bpe", "piece"]
)
def test_without_the_package_the_exact_tokenizer_is_used_with_a_warning(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    tokenizer = request.getfixturevalue(kind)
    fast, exact = run_both(tmp_path, tokenizer, TEXTS, preprocess_here)
    assert fast == exact
    assert f"{name} is not installed (pip install {name}" in caplog.text


@needs("fastokens")
def test_a_tokenizer_that_the_backend_refuses_is_read_by_the_exact_one(
    tmp_path: Path, bpe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads(bpe.read_text()) | {"normalizer": {"type": "NFKD"}}
    strange = tmp_path / "tokenizer.json"
    strange.write_text(json.dumps(content))
    fast, exact = run_both(tmp_path, strange, ["\ufb01ne"], preprocess_here)
    assert fast == exact
    assert read_texts(tmp_path / "fast", strange) == ["fine"]
    assert "fastokens refuses" in caplog.text and "using the exact tokenizer" in caplog.text


# The message


class Fixed:
    """A backend that gives the same ids whatever the text."""

    name = "fixed"

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self._ids * len(texts)), np.array([len(self._ids)] * len(texts))


def test_a_difference_shows_the_text_round_it_and_the_ids_from_there_on(bpe: Path) -> None:
    tokenizer = Tokenizer.load(bpe)
    text = "the state " * 500 + "of the union" + " the state" * 500
    exact = tokenizer.encode(text)
    for change in ("wrong", "shorter", "longer"):
        ids = list(exact)
        at = len(tokenizer.encode("the state " * 500)) if change == "wrong" else len(ids)
        if change == "wrong":
            ids[at] += 1
        elif change == "shorter":
            ids = ids[: at - 1]
        else:
            ids.append(5)
        found = difference(encode_checked(Fixed(ids), [text]), tokenizer)
        assert found is not None
        first = at - 1 if change == "shorter" else at
        assert found.fast == tuple(ids[first : first + 8])
        assert found.exact == tuple(exact[first : first + 8])
        assert len(found.text) <= 200 and found.text in text
        assert change != "wrong" or "of the union" in found.text
        assert str(found) == f"{found.text!r}: {list(found.fast)} for {list(found.exact)}"
    assert difference(encode_checked(Fixed(exact), [text, text]), tokenizer) is None


def test_ids_outside_the_vocabulary_are_refused(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "fast_encoder", lambda *_: (Fixed([70_000]), ""))
    monkeypatch.setattr(pipeline, "difference", lambda *_: None)
    (tmp_path / "a.jsonl").write_bytes(lines(["a text that is not compared"]))
    with pytest.raises(ValueError, match=r"fixed gave ids 70000\.\.70000, outside \[0, \d+\)"):
        preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=bpe, exact=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
