"""Tokenizer: exact round trip, borders of text, errors, deterministic training."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.data import tokenizer as tokenizer_module
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.tokenizer_training import train_tokenizer

TEXTS = [f"The state of the union number {i} is strong.\n\nWe café thank you.\n" for i in range(50)]
# U+2581 is sentencepiece's own space; lone surrogates are no UTF-8.
ANY_TEXT = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_tokenizer(iter(TEXTS), vocab_size=320, output=path)


@given(text=ANY_TEXT)
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=ANY_TEXT, data=st.data())
def test_prefix_and_candidate_text_add_up_to_the_text_at_every_cut(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    prefix_text, candidate_text = tokenizer.continuation_text(
        ids[:cut], [*ids[cut:], tokenizer.eod]
    )
    assert prefix_text + candidate_text == text


def test_a_character_whose_bytes_are_parted_goes_to_the_candidate(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the \u65e5 x")
    first_byte = tokenizer.encode("the ")
    cut = len(first_byte) + 1  # one of three bytes in the prefix
    assert tokenizer.continuation_text(ids[:cut], ids[cut:]) == ("the ", "\u65e5 x")
    assert tokenizer.decode(ids[:cut]) == "the \ufffd"


def test_leading_space_of_a_continuation_is_kept(tokenizer: Tokenizer) -> None:
    prefix, suffix = tokenizer.encode("The state"), tokenizer.encode(" of the union")
    assert tokenizer.continuation_text(prefix, np.array(suffix, dtype=np.int32)) == (
        "The state",
        " of the union",
    )


def test_end_of_document_adds_no_text_and_markup_in_text_is_only_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a</s><unk><0x41>")
    assert tokenizer.eod not in ids
    assert tokenizer.decode([*ids, tokenizer.eod]) == "a</s><unk><0x41>"


def test_word_starts_marks_the_tokens_that_begin_with_a_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.word_starts.shape == (tokenizer.vocab_size,)
    assert tokenizer.word_starts.dtype == bool
    for token in tokenizer.encode("".join(TEXTS)):
        assert tokenizer.word_starts[token] == tokenizer.decode([token]).startswith(" ")


def test_training_twice_gives_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), vocab_size=320, output=tmp_path / "again.model")
    assert again.digest == tokenizer.digest == Tokenizer.load(tmp_path / "again.model").digest
    assert [p.name for p in tmp_path.iterdir()] == ["again.model"]


def test_failed_training_leaves_no_file_and_names_the_cause(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "some text"
        raise ValueError("corpus/a.jsonl:7: not valid JSON")

    with pytest.raises(ValueError, match=r"^corpus/a\.jsonl:7: not valid"):
        train_tokenizer(broken(), vocab_size=300, output=tmp_path / "t.model")
    with pytest.raises(ValueError, match="--vocab-size 9000"):
        train_tokenizer(iter(TEXTS), vocab_size=9000, output=tmp_path / "t.model")
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(iter(()), vocab_size=300, output=tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_missing_or_broken_model_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.model cannot be read .*train_tokenizer"):
        Tokenizer.load(tmp_path / "none.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model"):
            Tokenizer.load(tmp_path / "bad.model")


def test_ids_outside_the_vocabulary_are_an_error(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=r"must lie in \[0, 320\)"):
            tokenizer.decode([5, wrong])


def test_an_id_that_only_the_model_knows_is_one_replacement_character(tokenizer: Tokenizer) -> None:
    prefix, first, last = (tokenizer.encode(text) for text in ("The state", " of", " union \u65e5"))
    size = tokenizer.vocab_size + 8
    ids = [*first, size - 8, *last[:-1], size - 1, size - 1, last[-1], tokenizer.eod]
    for begin in (prefix, []):
        found = tokenizer.continuation_text(begin, ids, model_vocab_size=size)
        assert found == (tokenizer.decode(begin), " of\ufffd union " + 5 * "\ufffd")
    for wrong in (-1, size):
        with pytest.raises(ValueError, match=r"must lie in \[0, 328\)"):
            tokenizer.decode([5, wrong], model_vocab_size=size)
    with pytest.raises(ValueError, match=r"must lie in \[0, 320\)"):  # not of the prefix: data
        tokenizer.continuation_text([size - 1], ids, model_vocab_size=size)


def test_a_space_after_an_unknown_id_stays_where_the_decoder_drops_the_first_of_a_text(
    tmp_path: Path,
) -> None:
    texts, path = iter(TEXTS), tmp_path / "t.model"
    sentencepiece.SentencePieceTrainer.Train(  # as Llama 2's: a space before every text
        sentence_iterator=texts, model_prefix=str(path.with_suffix("")), vocab_size=320,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.load(path)
    size = tokenizer.vocab_size + 1
    union = tokenizer.encode("union")
    assert tokenizer.decode([*union, size - 1, *union], model_vocab_size=size) == (
        "union\ufffd union"
    )


def test_a_gap_of_a_tokenizer_json_and_what_lies_behind_it_are_replacement_characters(
    tmp_path: Path,
) -> None:
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 5, "\u0120b": 4}
    path = json_tokenizer(
        tmp_path, model={"vocab": vocabulary}, decoder={"type": "ByteLevel", "trim_offsets": False,
        "add_prefix_space": False, "use_regex": False},
    )  # fmt: skip
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 6
    assert tokenizer.continuation_text([1], [3, 4, 9, 9, 5, 0], model_vocab_size=10) == (
        "a", "\ufffd b\ufffd\ufffdab",
    )  # fmt: skip
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match=r"must lie in \[0, 10\)"):
            tokenizer.decode([wrong], model_vocab_size=10)


def json_tokenizer(folder: Path, **parts: object) -> Path:
    """A small tokenizer.json, parts of it replaced."""
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")])
    )
    made.add_special_tokens(["<|endoftext|>"])
    content = json.loads(made.to_str())
    content["model"] |= parts.pop("model", {})
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content | parts))
    return path


@pytest.mark.parametrize("charsmap", [b"", b"\xff\xff\xff\xff", b"\0\0\0"])
def test_a_tokenizer_json_on_which_the_library_panics_is_an_error(
    tmp_path: Path, charsmap: bytes
) -> None:
    text = base64.b64encode(charsmap).decode()
    path = json_tokenizer(
        tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": text}
    )
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: \d+ bytes are not a .*give the file of"
    ):
        Tokenizer.load(path)


def test_a_panic_on_a_text_is_an_error(tmp_path: Path) -> None:
    text = base64.b64encode(bytes(4)).decode()
    path = json_tokenizer(
        tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": text}
    )
    tokenizer = Tokenizer.load(path)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_all([text])):
        with pytest.raises(ValueError, match=r"json: its library panicked on a text; .*index out"):
            encode("ab")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_a_tokenizer_is_read_is_no_error_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = json_tokenizer(tmp_path)

    def interrupted(*_: object) -> None:
        raise error

    stand_in = SimpleNamespace(Tokenizer=SimpleNamespace(from_buffer=interrupted))
    monkeypatch.setattr(tokenizer_module, "tokenizers", stand_in)
    with pytest.raises(error):
        Tokenizer.load(path)


def test_a_tokenizer_with_dropout_is_refused(tmp_path: Path) -> None:
    path = json_tokenizer(tmp_path, model={"dropout": 0.5})
    with pytest.raises(ValueError, match=r"model\.dropout is 0\.5, .*; set model\.dropout to null"):
        Tokenizer.load(path)
    for none in (None, 0.0):
        tokenizer = Tokenizer.load(json_tokenizer(tmp_path, model={"dropout": none}))
        assert all(tokenizer.encode("ab") == [3] for _ in range(50))
