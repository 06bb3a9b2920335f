"""Every input format gives the same bytes, and the provenance says where they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from preprocess_helpers import (
    FORMATS,
    TEXTS,
    byte_level_bpe,
    documents,
    lines,
    parts,
    preprocess_here,
    read_texts,
    write_arrow,
)

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def expected(bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What TEXTS give as plain .jsonl."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "a.jsonl").write_bytes(lines(TEXTS))
    preprocess_here([folder / "a.jsonl"], folder / "d", tokenizer=bpe)
    assert read_texts(folder / "d", bpe) == TEXTS
    return parts(folder / "d", (".bin", ".idx"))


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_documents_give_the_same_bytes_in_every_format(
    tmp_path: Path, bpe: Path, expected: dict[str, bytes], name: str
) -> None:
    (tmp_path / "in").mkdir()
    manifest = preprocess_here([FORMATS[name](tmp_path / "in")], tmp_path / "d", tokenizer=bpe)
    assert parts(tmp_path / "d", (".bin", ".idx")) == expected
    assert (manifest.documents, manifest.bad_records) == (len(TEXTS), 0)
    records = [row["record"] for row in documents(tmp_path / "d")]
    single = len(manifest.sources) == 1
    assert not single or records == list(range(1, len(TEXTS) + 1))
    assert "txt" not in name or records == [1] * len(TEXTS)


def test_bom_crlf_and_blank_lines_change_no_document(
    tmp_path: Path, bpe: Path, expected: dict[str, bytes]
) -> None:
    windows = b"\xef\xbb\xbf" + lines(TEXTS).replace(b"\n", b"\r\n\r\n \t\r\n")
    (tmp_path / "a.jsonl").write_bytes(windows)
    preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=bpe)
    assert parts(tmp_path / "d", (".bin", ".idx")) == expected
    found = [row["record"] for row in documents(tmp_path / "d")]
    assert found == [1 + 3 * i for i in range(len(TEXTS))]  # lines of the file
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n one \r\n\r\n")
    preprocess_here([tmp_path / "a.txt"], tmp_path / "e", tokenizer=bpe)
    assert read_texts(tmp_path / "e", bpe) == ["\r\n one \r\n\r\n"]


def nested_table(column: Any) -> pa.Table:
    return pa.table({"a": column, "text": ["no"] * len(column)})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_dotted_text_key_goes_deeper_and_nulls_are_bad_records(
    tmp_path: Path, bpe: Path, kind: str
) -> None:
    values = [
        {"text": "one", "b": 1},
        {"text": None, "b": 2},
        None,
        {"text": "two", "b": 3},
        {"text": "", "b": 4},
        {"text": "one", "b": 5},
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"a": value, "text": "no"}) + "\n" for value in values))
    elif kind == "parquet":
        pq.write_table(nested_table(values), path, row_group_size=2)
    else:
        write_arrow(path, nested_table(values), rows=2)
    settings = {"tokenizer": bpe, "text_key": "a.text", "kept": ("a.b",)}
    with pytest.raises(ValueError, match=rf"a\.{kind}:2: a\.text is NoneType"):
        preprocess_here([path], tmp_path / "out" / "d", **settings)
    assert list((tmp_path / "out").iterdir()) == []
    manifest = preprocess_here([path], tmp_path / "d", max_bad_records=3, **settings)
    assert manifest.bad_records == 3
    assert read_texts(tmp_path / "d", bpe) == ["one", "two", "one"]
    found = [(row["record"], row["a.b"]) for row in documents(tmp_path / "d")]
    assert found == [(1, "1"), (4, "3"), (6, "5")]


def test_nulls_in_dictionary_columns_and_in_files_without_any_string(
    tmp_path: Path, bpe: Path
) -> None:
    values = ["one", None, "two", None, "one"]
    column = pa.array(values).dictionary_encode()
    write_arrow(tmp_path / "a.arrow", pa.table({"text": column}), rows=2)
    pq.write_table(pa.table({"text": values}), tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(pa.table({"text": pa.nulls(3, pa.string())}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    manifest = preprocess_here(
        [tmp_path / "*.arrow", tmp_path / "*.parquet"],
        tmp_path / "d",
        tokenizer=bpe,
        max_bad_records=7,
    )
    assert (manifest.documents, manifest.bad_records) == (6, 7)
    assert read_texts(tmp_path / "d", bpe) == ["one", "two", "one"] * 2


RECORDS: list[dict[str, Any]] = [
    {"text": "one", "url": "https://a", "meta": {"lang": "en", "score": 0.5}, "tags": ["x", "y"]},
    {"text": "two", "url": None, "meta": {"lang": None, "score": 1.0}, "tags": []},
    {"text": "three\u00e9", "url": "https://c", "meta": None, "tags": None},
]
KEPT = ("url", "meta.lang", "meta.score", "tags", "meta")
FOUND = [
    ("https://a", "en", "0.5", '["x","y"]', '{"lang":"en","score":0.5}'),
    (None, None, "1.0", "[]", '{"lang":null,"score":1.0}'),
    ("https://c", None, None, None, None),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_documents_parquet_says_where_a_document_came_from_and_what_was_kept(
    tmp_path: Path, bpe: Path, kind: str
) -> None:
    (tmp_path / "0.txt").write_text("zero")
    path = tmp_path / f"1.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n\n" for record in RECORDS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)
    else:
        write_arrow(path, pa.Table.from_pylist(RECORDS), rows=2)
    inputs = [tmp_path / "0.txt", path]
    preprocess_here(inputs, tmp_path / "d", tokenizer=bpe, kept=KEPT)
    rows = documents(tmp_path / "d")
    texts = ["zero", *(record["text"] for record in RECORDS)]
    dataset = IndexedDataset(tmp_path / "d")
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        tokens = dataset.document(i).astype("<u2")
        assert row["tokens"] == len(tokens) == len(Tokenizer.load(bpe).encode(text)) + 1
        assert row["text_xxh3_64"] == xxhash.xxh3_64_intdigest(text.encode())
        assert row["tokens_xxh3_64"] == xxhash.xxh3_64_intdigest(tokens.tobytes())
    lines_of = (1, 3, 5) if kind == "jsonl" else (1, 2, 3)
    expected = [(0, 1), *((1, line) for line in lines_of)]
    assert [(row["source"], row["record"]) for row in rows] == expected
    assert [tuple(row[key] for key in KEPT) for row in rows] == [(None,) * len(KEPT), *FOUND]


@pytest.mark.parametrize("kept", [("source",), ("url", "url"), ("url", "tokens")])
def test_a_kept_key_that_would_name_a_column_twice_is_refused(
    tmp_path: Path, bpe: Path, kept: tuple[str, ...]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "source": "b", "url": "c"}\n')
    with pytest.raises(ValueError, match=f"--keep {kept[-1]}: .* of this name already"):
        preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=bpe, kept=kept)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
