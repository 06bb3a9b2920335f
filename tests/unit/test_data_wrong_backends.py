"""A fast backend that is wrong, fails or is not there: the bytes are the exact tokenizer's."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import preprocess_helpers
import pytest
import xxhash
from preprocess_helpers import (
    byte_level_bpe,
    lines,
    parts,
    preprocess,
    preprocess_here,
    read_texts,
)

from megatron_sip.data.preprocess import blocks, encoders, journal, pipeline, worker
from megatron_sip.data.preprocess.encoders import (
    CHECK_EVERY,
    difference,
    encode_checked,
    fast_encoder,
)
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.tokenizer_training import train_tokenizer

TEXTS = [
    f"Speech {i}: the state of the union, isn't it?\nWe caf\u00e9 thank you" for i in range(50)
]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    return byte_level_bpe(folder / "tokenizer.json", TEXTS)


@pytest.fixture(scope="module")
def piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "t.model"
    train_tokenizer(iter(TEXTS), vocab_size=320, output=path)
    return path


class PanicException(BaseException):
    """Stands for a panic of a library written in Rust."""


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
            if "panics" in text:
                raise PanicException("index out of bounds")
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
@pytest.mark.parametrize(
    ("word", "message"),
    [("fatal", "index out of bounds"), ("panics", r"it panicked (index out of bounds)")],
)
def test_a_backend_that_fails_on_a_text_leads_to_the_exact_tokenizer(
    tmp_path: Path, bpe: Path, caplog: pytest.LogCaptureFixture, word: str, message: str
) -> None:
    texts = [*TEXTS * 3, f"This one is {word}.", *TEXTS]
    fast, exact = run_both(tmp_path, bpe, texts, preprocess_here)
    assert fast == exact
    assert f"spoiled failed: {message}; beginning anew with the exact" in caplog.text
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
    begun: list[bool] = []
    monkeypatch.setattr(preprocess_helpers, "begun", begun)
    preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", **settings)
    assert begun == [True]  # one pool, of exact workers
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


def test_a_backend_that_panics_on_a_tokenizer_refuses_it(
    bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(path: Path) -> None:
        raise PanicException("unwrap")

    monkeypatch.setattr(encoders, "FastokensEncoder", panic)
    assert fast_encoder(bpe) == (None, f"fastokens refuses {bpe} (it panicked (unwrap))")


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
