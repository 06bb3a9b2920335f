"""Damaged and lying files: a clear error that names the file."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preprocess_helpers import (
    COMPRESS,
    assert_refused,
    byte_level_bpe,
    lines,
    preprocess_here,
    read_texts,
    write_arrow,
)

TEXTS = [f"text {i} of the union" for i in range(300)]
MIB = 1 << 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json", TEXTS)


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


def test_hostile_input_by_url_is_refused_alike(tmp_path: Path, bpe: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/hostile/a.jsonl.gz", gzip.compress(lines(TEXTS))[:-9])
    memory.pipe_file("/hostile/b.parquet", FILES["a.parquet"][:-1])
    for name in ("a.jsonl.gz", "b.parquet"):
        match = rf"memory:///hostile/{re.escape(name)}: damaged or truncated"
        assert_refused([f"memory://hostile/{name}"], tmp_path, match, tokenizer=bpe)
    assert_refused(["memory://nothing/*"], tmp_path, "matches no file", tokenizer=bpe)
