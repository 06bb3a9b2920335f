"""Malicious input is refused in bounded memory."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from preprocess_helpers import (
    COMPRESS,
    byte_level_bpe,
    lines,
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
from preprocess_helpers import preprocess_here

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
