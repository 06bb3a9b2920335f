"""Records that cannot be used, or look so: named and counted, or read as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from preprocess_helpers import (
    assert_refused,
    byte_level_bpe,
    documents,
    lines,
    preprocess_here,
    read_texts,
)

from megatron_sip.data.preprocess import blocks

TEXTS = [f"text {i} of the union" for i in range(300)]
MIB = 1 << 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json", TEXTS)


LONE = "half of a surrogate|surrogate|not valid JSON"
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "invalid UTF-8": (b'{"text": "a\xff"}', "not valid JSON"),
    "half a character": (b'{"text": "a\xe2\x82"}', "not valid JSON"),
    "raw surrogate": (b'{"text": "\xed\xa0\x80"}', "not valid JSON"),
    "escaped surrogate": (rb'{"text": "\udc00"}', LONE),
    "surrogates the wrong way round": (rb'{"text": "\udc00\ud800"}', LONE),
    "raw NUL": (b'{"text": "a\0b"}', "not valid JSON"),
    "only NUL": (bytes(100), "not valid JSON"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not valid JSON"),
    "cut off": (b'{"text": "a', "not valid JSON"),
    "two values": (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
    "deep lists": (b"[" * 1_000_000, "not valid JSON"),
    "deep objects": (b'{"a":' * 300_000 + b"1" + b"}" * 300_000, "not valid JSON"),
    "deep beside the text": (b'{"text": "a", "b": ' + b"[" * 5000 + b"]" * 5000 + b"}", "valid"),
    "a number": (b'{"text": 7}', "text is int, but must be a string"),
    "a huge integer": (b'{"text": 1' + b"0" * 5000 + b"}", "text is|not valid JSON"),
    "a huge float": (b'{"text": 1e999}', "text is float|not valid JSON"),
    "not a number": (b'{"text": NaN}', "not valid JSON"),
    "a list": (b'{"text": ["a"]}', "text is list"),
    "null": (b'{"text": null}', "text is NoneType"),
    "no object": (b'["text"]', "no key 'text'"),
    "another key": (b'{"Text": "a"}', "no key 'text'"),
    "empty": (b'{"text": ""}', "text is empty"),
    "bom in the middle": (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_cannot_be_used_is_named_or_counted(
    tmp_path: Path, bpe: Path, name: str
) -> None:
    line, reason = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    match = rf"1 bad records are more than --max-bad-records 0(?s:.*)a\.jsonl:2: .*({reason})"
    assert_refused([path], tmp_path, match, tokenizer=bpe)
    manifest = preprocess_here([path], tmp_path / "d", tokenizer=bpe, max_bad_records=1)
    assert manifest.bad_records == 1
    assert read_texts(tmp_path / "d", bpe) == ["one", "two"]


GOOD_LINES: dict[str, tuple[bytes, str]] = {
    "escaped NUL": (rb'{"text": "a\u0000b"}', "a\0b"),
    "surrogate pair": (rb'{"text": "\ud83d\ude00"}', "\U0001f600"),
    "noncharacter": (b'{"text": "\xef\xbf\xbf"}', "\uffff"),
    "the last of two keys": (b'{"text": "first", "text": "last"}', "last"),
    "a huge integer beside": (b'{"text": "a", "n": 1' + b"0" * 300 + b"}", "a"),
    "special token": (b'{"text": "<|endoftext|>"}', "<|endoftext|>"),
    "line separators": ('{"text": "a\u2028b\u0085c"}'.encode(), "a\u2028b\u0085c"),
    "spaces around": (b' \t {"text": "a"} \t \r', "a"),
}


@pytest.mark.parametrize("name", GOOD_LINES)
def test_a_strange_line_is_read_as_it_is(tmp_path: Path, bpe: Path, name: str) -> None:
    line, text = GOOD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(line)
    preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=bpe)
    assert read_texts(tmp_path / "d", bpe) == [text]


def test_a_document_without_tokens_is_a_bad_record(tmp_path: Path) -> None:
    strip = tokenizers.normalizers.Strip()
    bpe = byte_level_bpe(tmp_path / "tokenizer.json", TEXTS, normalizer=strip)
    (tmp_path / "a.jsonl").write_bytes(lines(["one", " \n ", "two", "\t"]))
    assert_refused([tmp_path / "a.jsonl"], tmp_path, r"a\.jsonl:2: gives no token", tokenizer=bpe)
    settings = {"tokenizer": bpe, "max_bad_records": 2}
    manifest = preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", **settings)
    assert manifest.bad_records == 2
    assert [row["record"] for row in documents(tmp_path / "d")] == [1, 3]
    (tmp_path / "a.jsonl").write_bytes(lines([" "]))
    match = "has no document; check the inputs"
    assert_refused([tmp_path / "a.jsonl"], tmp_path, match, **settings)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\xe2\x82", b"\xed\xa0\x80", b"\xef\xbb\xbf"])
def test_a_text_file_that_is_no_utf8_or_empty_is_named(
    tmp_path: Path, bpe: Path, content: bytes
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    match = r"a\.txt:1: (not valid UTF-8|file is empty)"
    assert_refused([tmp_path / "a.txt"], tmp_path, match, tokenizer=bpe)


@pytest.mark.parametrize("block_bytes", [100, MIB])
@pytest.mark.parametrize("last_newline", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_over_the_limit_is_passed_over_wherever_it_stands(
    tmp_path: Path,
    bpe: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    last_newline: bool,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    texts = ["one", "two"]
    texts.insert(place, "long" * 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(texts) if last_newline else lines(texts).removesuffix(b"\n"))
    settings = {"tokenizer": bpe, "max_record_bytes": 2000}
    match = rf"a\.jsonl:{place + 1}: \d+ bytes are more than --max-record-mb allows \(2000\)"
    assert_refused([path], tmp_path, match, **settings)
    preprocess_here([path], tmp_path / "d", max_bad_records=1, **settings)
    assert read_texts(tmp_path / "d", bpe) == ["one", "two"]


def test_a_record_of_exactly_the_limit_is_taken(tmp_path: Path, bpe: Path) -> None:
    content = lines(["x" * 500])
    (tmp_path / "a.jsonl").write_bytes(content)
    size = len(content) - 1
    settings = {"tokenizer": bpe, "max_record_bytes": size}
    preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", **settings)
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    preprocess_here([tmp_path / "a.txt"], tmp_path / "e", **settings)
    pq.write_table(pa.table({"text": ["x" * size]}), tmp_path / "a.parquet")
    preprocess_here([tmp_path / "a.parquet"], tmp_path / "f", **settings)
    settings["max_record_bytes"] = size - 1
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        match = rf"{re.escape(name)}:1: {size} bytes are more"
        assert_refused([tmp_path / name], tmp_path, match, **settings)
