"""Damaged, lying and malicious input: a clear error or a counted bad record, in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from test_data_preprocess_formats import (
    COMPRESS,
    byte_level_bpe,
    documents,
    lines,
    preprocess_here,
    read_texts,
    write_arrow,
)

from megatron_sip.data.preprocess import blocks
from megatron_sip.data.preprocess.blocks import Cursor, read_blocks
from megatron_sip.data.preprocess.inputs import expand_inputs

TEXTS = [f"text {i} of the union" for i in range(300)]
MIB = 1 << 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json", TEXTS)


def assert_refused(inputs: Sequence[Any], folder: Path, match: str, **settings: Any) -> None:
    """A ValueError, nothing published, no working folder left."""
    with pytest.raises(ValueError, match=match):
        preprocess_here(inputs, folder / "out" / "d", **settings)
    assert not (folder / "out").exists() or list((folder / "out").iterdir()) == []


# Lines

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


# Files


def test_empty_files_are_refused_whatever_their_kind(tmp_path: Path, bpe: Path) -> None:
    suffixes = [".jsonl", ".txt", ".parquet", ".arrow", *(f".jsonl{c}" for c in COMPRESS)]
    for suffix in suffixes:
        path = tmp_path / f"a{suffix}"
        path.touch()
        match = rf"a{re.escape(suffix)} is empty \(0 bytes\); remove it"
        assert_refused([path], tmp_path, match, tokenizer=bpe)
        assert_refused([tmp_path], tmp_path, match, tokenizer=bpe)
        path.unlink()
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(b""))
        assert_refused([path], tmp_path, "has no document", tokenizer=bpe)


def written(write: Callable[..., Any], *arguments: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    write(*arguments, stream, **options)
    return stream.getvalue()


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    return written(pq.write_table, table, **options)


def arrow_bytes(table: pa.Table, new: Any) -> bytes:
    stream = io.BytesIO()
    with new(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return stream.getvalue()


TABLE = pa.table({"text": TEXTS, "list": [[text] for text in TEXTS]})
FILES: dict[str, bytes] = {
    **{f"a.jsonl{suffix}": compress(lines(TEXTS)) for suffix, compress in COMPRESS.items()},
    **{f"b.txt{suffix}": compress(b"text" * 3000) for suffix, compress in COMPRESS.items()},
    "a.parquet": parquet_bytes(TABLE, row_group_size=100),
    "b.parquet": parquet_bytes(TABLE, row_group_size=100, use_dictionary=False),
    "a.arrow": arrow_bytes(TABLE, pa.ipc.new_stream),
    "b.arrow": arrow_bytes(TABLE, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, bpe: Path, name: str) -> None:
    whole = FILES[name]
    (tmp_path / name).write_bytes(whole)
    preprocess_here([tmp_path / name], tmp_path / "d", tokenizer=bpe)
    for size in {1, 3, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}:
        (tmp_path / name).write_bytes(whole[:size])
        match = rf"{re.escape(name)}: damaged or truncated .*; fetch the file again or remove it"
        assert_refused([tmp_path / name], tmp_path, match, tokenizer=bpe)


def test_an_arrow_stream_that_ends_between_two_batches_is_refused(
    tmp_path: Path, bpe: Path
) -> None:
    whole = FILES["a.arrow"]
    ends = []
    for size in range(8, len(whole), 8):
        try:
            rows = sum(len(batch) for batch in pa.ipc.open_stream(whole[:size]))
        except (pa.ArrowInvalid, OSError):
            continue
        ends.append((size, rows))  # pyarrow takes these for whole
    assert [rows for _, rows in ends] == [0, 50, 100, 150, 200, 250, 300]
    for size, _ in ends:
        (tmp_path / "a.arrow").write_bytes(whole[:size])
        assert_refused([tmp_path / "a.arrow"], tmp_path, "no end of the stream", tokenizer=bpe)
    (tmp_path / "a.arrow").write_bytes(whole + bytes(8))
    assert_refused([tmp_path / "a.arrow"], tmp_path, "no end of the stream", tokenizer=bpe)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("a")])
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, bpe: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(lines(TEXTS))
    match = rf"{re.escape(name)}: damaged or truncated {name.rpartition('.')[2]} data"
    assert_refused([tmp_path / name], tmp_path, match, tokenizer=bpe)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_second_stream_is_refused_and_not_left_out(
    tmp_path: Path, bpe: Path, suffix: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    stream = COMPRESS[suffix](lines(TEXTS))
    settings: dict[str, Any] = {"tokenizer": bpe}
    for second in (b"?" + stream[1:], stream[:-1], stream[:3], b"garbage"):
        path.write_bytes(stream + second)
        assert_refused([path], tmp_path, "damaged or truncated", **settings)
    path.write_bytes(stream + stream)
    assert preprocess_here([path], tmp_path / "d", **settings).documents == 2 * len(TEXTS)


def zigzag(number: int) -> bytes:
    """A number as Parquet's footer holds it."""
    left, found = number * 2, b""
    while left >= 128:
        left, found = left >> 7, found + bytes([left & 127 | 128])
    return found + bytes([left])


@pytest.mark.parametrize("which", ["file", "group"])
@pytest.mark.parametrize("lie", [200, 250, 8000])
def test_a_parquet_footer_that_lies_about_the_rows_is_refused(
    tmp_path: Path, bpe: Path, which: str, lie: int
) -> None:
    table = pa.table({"text": [f"{i} text" for i in range(300)]})
    data = parquet_bytes(table, write_statistics=False)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    places = [start + m.start() for m in re.finditer(re.escape(zigzag(300)), data[start:])]
    place = places[0 if which == "file" else -1]
    lying = data[:place] + zigzag(lie) + data[place + 2 :]
    facts = pq.read_metadata(io.BytesIO(lying))
    assert lie == (facts.num_rows if which == "file" else facts.row_group(0).num_rows)
    (tmp_path / "a.parquet").write_bytes(lying)
    said = r"damaged parquet data \(\d+ rows are said to be there, \d+ are\)"
    assert_refused([tmp_path / "a.parquet"], tmp_path, rf"a\.parquet: {said}", tokenizer=bpe)


DAMAGE = """
import random, sys
from pathlib import Path
from megatron_sip.data.preprocess.blocks import Cursor, read_blocks
from megatron_sip.data.preprocess.inputs import expand_inputs
from megatron_sip.data.preprocess.texts import texts_of

draw, columns, errors = random.Random(1), ("text", "list"), 0
for path in map(Path, sys.argv[1:]):
    whole = path.read_bytes()
    for _ in range(250):
        data, size = bytearray(whole), len(whole)
        place = draw.choice([draw.randrange(size), max(0, size - draw.randrange(1, 1500))])
        match draw.randrange(3):
            case 0:
                data[place] = draw.choice([0, 255, data[place] ^ 1 << draw.randrange(8)])
            case 1:
                data[place : place + draw.randrange(1, 20)] = b""
            case 2:
                data[place:place] = draw.randbytes(draw.randrange(1, 20))
        path.write_bytes(data)
        try:
            files = expand_inputs([str(path)])
            for block in read_blocks(
                files, columns=columns, max_record_bytes=1 << 20, start=Cursor()
            ):
                list(texts_of(block, text_key="text", kept=("list",), max_record_bytes=1 << 20))
        except ValueError as error:
            assert path.name in str(error), error
            errors += 1
print(errors)
"""


def test_damage_anywhere_is_never_more_than_an_error_that_names_the_file(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    files = [str(tmp_path / name) for name in FILES]
    command = [sys.executable, "-c", DAMAGE, *files]  # a process: pyarrow may abort
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 100 * len(FILES)


def test_missing_wrong_and_doubled_columns_are_named(tmp_path: Path, bpe: Path) -> None:
    table = pa.table({"id": [1], "body": ["a"], "meta": [{"text": "b"}], "x.y": ["c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table)
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    write_arrow(tmp_path / "b.arrow", twice)
    for kind in ("parquet", "arrow"):
        path, columns = tmp_path / f"a.{kind}", "but id, body, meta, meta.text; give one"
        for key in ("text", "meta.nothing", "body.text", "x.y", ""):
            match = rf"a\.{kind} has no column '{re.escape(key)}', {columns}"
            assert_refused([path], tmp_path, match, tokenizer=bpe, text_key=key)
        settings = {"tokenizer": bpe, "text_key": "body", "kept": ("nothing",)}
        assert_refused([path], tmp_path, "has no column 'nothing'", **settings)
        reason = r":1: id is int, but must be a string"
        assert_refused([path], tmp_path, reason, tokenizer=bpe, text_key="id")
        reason = r":1: meta is dict, but must be a string"
        assert_refused([path], tmp_path, reason, tokenizer=bpe, text_key="meta")
        path = tmp_path / f"b.{kind}"
        assert_refused([path], tmp_path, "has 2 columns 'text'", tokenizer=bpe)


def test_bytes_and_invalid_utf8_in_tables_are_bad_records_or_damage(
    tmp_path: Path, bpe: Path
) -> None:
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 3, 4, 7)))
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"one\xfftwo")])
    table = pa.table({"text": text, "raw": [b"a", b"b", b"c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table)
    path = tmp_path / "a.parquet"
    assert_refused([path], tmp_path, r"a\.parquet:2: text is bytes", tokenizer=bpe)
    preprocess_here([path], tmp_path / "d", tokenizer=bpe, max_bad_records=1)
    assert read_texts(tmp_path / "d", bpe) == ["one", "two"]
    match = r"a\.arrow: damaged or truncated arrow data .*UTF-?8"
    assert_refused([tmp_path / "a.arrow"], tmp_path, match, tokenizer=bpe)
    settings = {"tokenizer": bpe, "text_key": "raw"}
    assert_refused([path], tmp_path, r"a\.parquet:1: raw is bytes", **settings)


# Links


def test_links_are_followed_out_of_their_folder_only_if_asked_to(tmp_path: Path, bpe: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "elsewhere"
    (inside / "deep").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (inside / "a.jsonl").write_bytes(lines(["a"]))
    (outside / "deep" / "b.jsonl").write_bytes(lines(["b"]))
    link, settings = inside / "deep" / "b.jsonl", {"tokenizer": bpe, "follow_links": True}
    link.symlink_to(outside / "deep" / "b.jsonl")
    match = r"b\.jsonl is a link out of .*, to .*elsewhere.*b\.jsonl; give --follow-links"
    for pattern in (inside, inside / "**" / "*.jsonl", inside / "*" / "*"):
        assert_refused([pattern], tmp_path, match, tokenizer=bpe)
    preprocess_here([inside], tmp_path / "d", **settings)
    assert read_texts(tmp_path / "d", bpe) == ["a", "b"]
    preprocess_here([link], tmp_path / "d", tokenizer=bpe)  # named itself
    assert read_texts(tmp_path / "d", bpe) == ["b"]
    link.unlink()
    (inside / "more").symlink_to(outside)  # a folder
    assert_refused([inside], tmp_path, match, tokenizer=bpe)
    preprocess_here([inside], tmp_path / "d", **settings)
    assert read_texts(tmp_path / "d", bpe) == ["a", "b"]
    (inside / "more").unlink()
    link.symlink_to(inside / "a.jsonl")  # stays inside
    preprocess_here([inside], tmp_path / "d", tokenizer=bpe)
    assert read_texts(tmp_path / "d", bpe) == ["a", "a"]


@pytest.mark.parametrize("follow_links", [True, False])
def test_broken_and_endless_links_are_refused(
    tmp_path: Path, bpe: Path, follow_links: bool
) -> None:
    inside = tmp_path / "in"
    (inside / "deep").mkdir(parents=True)
    (inside / "a.jsonl").write_bytes(lines(["a"]))
    link, settings = inside / "b.jsonl", {"tokenizer": bpe, "follow_links": follow_links}
    for target in (tmp_path / "nothing", link):
        link.symlink_to(target)
        match = r"b\.jsonl is a link to .*, which is not there; remove it"
        for pattern in (inside, inside / "*.jsonl", link):
            assert_refused([pattern], tmp_path, match, **settings)
        link.unlink()
    for target in (inside, tmp_path, inside / "deep"):
        (inside / "deep" / "round").symlink_to(target)
        match = r"round is a link to .*, which it lies in; remove it"
        assert_refused([inside], tmp_path, match, **settings)
        (inside / "deep" / "round").unlink()


# Memory


def test_rows_go_to_a_worker_a_block_at_a_time_however_they_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10_000)
    column = pa.array(["x" * 3000]).dictionary_encode().take(pa.array([0] * 5000))
    table = pa.table({"text": column, "pay": ["load" * 1000] * 5000})
    pq.write_table(table.drop_columns("pay"), tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table.select(["pay", "text"]), rows=5000)
    plain = table.set_column(0, "text", column.dictionary_decode())
    write_arrow(tmp_path / "b.arrow", plain, rows=5000)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        files = expand_inputs([str(tmp_path / name)])
        found = read_blocks(files, columns=("text",), max_record_bytes=MIB, start=Cursor())
        rows, sizes = [], []
        for block in found:
            rows.append(block.end.record - block.cursor.record)
            sizes.append(len(pickle.dumps(block)))  # as it goes to a worker
        assert (sum(rows), max(rows)) == (5000, 3)
        assert max(sizes) < 13_000


MEASURE = """
import json, sys
from pathlib import Path
from test_data_preprocess_formats import preprocess_here

folder, found = Path(sys.argv[1]), {}
for name in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
    settings = {"tokenizer": folder / "tokenizer.json", "max_bad_records": 1}
    out = folder / f"out-{name}"
    try:
        result = preprocess_here([folder / name], out / "d", **settings).documents
    except ValueError as error:
        result = str(error)
    status = Path("/proc/self/status").read_text()
    peak_mib = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    found[name] = (peak_mib, result, [p.name for p in out.iterdir()])
print(json.dumps(found))
"""


def sparse_lines(path: Path, size: int, *, place: int) -> None:
    """Three lines; the one at `place` is of so many NULs, which take no room on the disk."""
    with open(path, "wb") as stream:
        for i in range(3):
            if i == place:
                stream.truncate(stream.tell() + size)
                stream.seek(size, io.SEEK_CUR)
            else:
                stream.write(b'{"text": "a"}')
            stream.write(b"\n" * (i < 2))


def zeros(suffix: str, mebibytes: int) -> bytes:
    """So many MiB of zeros as one compressed stream."""
    made: Any = {
        ".gz": lambda: zlib.compressobj(9, zlib.DEFLATED, 31),
        ".zst": lambda: zstandard.ZstdCompressor(level=1).compressobj(),
        ".bz2": lambda: bz2.BZ2Compressor(1),
        ".xz": lambda: lzma.LZMACompressor(preset=0),
    }[suffix]()
    return b"".join(made.compress(bytes(MIB)) for _ in range(mebibytes)) + made.flush()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> dict[str, Any]:
    """By file: (peak MiB of memory, documents or error, what lies in the output folder)."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "tokenizer.json").write_bytes(bpe.read_bytes())
    (folder / "small.jsonl").write_bytes(lines(TEXTS))
    for place in range(3):
        sparse_lines(folder / f"line-{place}.jsonl", 300 * MIB, place=place)
    with open(folder / "all.txt", "wb") as stream:
        stream.truncate(300 * MIB)
    for suffix in COMPRESS:
        (folder / f"bomb.jsonl{suffix}").write_bytes(zeros(suffix, 80))
    (folder / "bomb.txt.zst").write_bytes((folder / "bomb.jsonl.zst").read_bytes())
    indices = pa.array([0]).take(pa.array([0] * 1_000_000))
    column = pa.DictionaryArray.from_arrays(indices.cast(pa.int32()), ["x" * 100_000])
    pq.write_table(pa.table({"text": column}), folder / "repeated.parquet")
    write_arrow(folder / "repeated.arrow", pa.table({"text": column}), rows=1_000_000)
    pages = pa.table({"text": ["x" * (80 * MIB)]})
    pq.write_table(pages, folder / "page.parquet", compression="zstd", use_dictionary=False)
    names = sorted(path.name for path in folder.iterdir() if path.name != "tokenizer.json")
    names.sort(key=lambda name: name != "small.jsonl")
    assert all((folder / n).stat().st_size < 5 * MIB for n in names if "bomb" in n or "re" in n)
    command = [sys.executable, "-c", MEASURE, str(folder), *names]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,  # without limits it would go on for hours
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


HUGE = ["line-0.jsonl", "line-1.jsonl", "line-2.jsonl"]
BOMBS = [*(f"bomb.jsonl{suffix}" for suffix in COMPRESS), "bomb.txt.zst"]
BOMBS += ["repeated.parquet", "repeated.arrow", "page.parquet"]


@pytest.mark.parametrize("name", HUGE)
def test_a_line_of_300_mib_is_one_bad_record(measured: dict[str, Any], name: str) -> None:
    assert measured[name][1] == 2
    assert len(measured[name][2]) == 5


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_expands_without_end_is_refused(
    measured: dict[str, Any], name: str
) -> None:
    _, error, left = measured[name]
    assert re.search(rf"{re.escape(name)}: \d+ bytes expand to more than \d+, which text", error)
    assert left == []


def test_a_text_file_over_the_limit_is_a_bad_record(measured: dict[str, Any]) -> None:
    assert "has no document" in measured["all.txt"][1]


def test_no_hostile_file_takes_more_memory_than_a_few_blocks(measured: dict[str, Any]) -> None:
    small, _, _ = measured["small.jsonl"]
    for name, (peak, _, _) in measured.items():
        assert peak < small + 75, f"{name}: {peak:.0f} MiB, {small:.0f} for a small file"


def test_hostile_input_by_url_is_refused_alike(tmp_path: Path, bpe: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/hostile/a.jsonl.gz", gzip.compress(lines(TEXTS))[:-9])
    memory.pipe_file("/hostile/b.parquet", FILES["a.parquet"][:-1])
    for name in ("a.jsonl.gz", "b.parquet"):
        match = rf"memory:///hostile/{re.escape(name)}: damaged or truncated"
        assert_refused([f"memory://hostile/{name}"], tmp_path, match, tokenizer=bpe)
    assert_refused(["memory://nothing/*"], tmp_path, "matches no file", tokenizer=bpe)
