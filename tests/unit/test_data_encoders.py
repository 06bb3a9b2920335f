"""Fast tokenizer backends give the ids of the exact tokenizer; where one does not, it is found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preprocess_helpers import (
    byte_level_bpe,
)

from megatron_sip.data.preprocess.encoders import (
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
