"""Work on datasets: Megatron's own files in and out, the first broken document, lying indexes."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_sip.data.document_mask import load_mask, mask_of
from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.indexed_files import HEADER
from megatron_sip.data.maintenance import inspect_view, layout, pieces, rows
from megatron_sip.data.maintenance.adopt import adopt, find_prefix
from megatron_sip.data.maintenance.inspect import inspect
from megatron_sip.data.maintenance.merge import merge
from megatron_sip.data.maintenance.output_folder import output_folder
from megatron_sip.data.maintenance.split import split, splits_of
from megatron_sip.data.maintenance.verify import verify
from megatron_sip.data.manifest import PARTS, Source, load_manifest
from megatron_sip.data.provenance import batch_of
from megatron_sip.data.splits import Split, parse_split
from megatron_sip.data.staged_dataset import StagedDataset, provenance_of
from megatron_sip.data.tokenizer import Tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCAB, EOD, MIN_TOKENS = 300, 1, 3
SOURCES = (Source(path="a.jsonl", bytes=10), Source(path="b.jsonl", bytes=20))
TOOL = Path(__file__).parents[2] / "tools" / "dataset.py"

Documents = list[list[int]]
ids = st.lists(st.integers(2, VOCAB - 1), max_size=9)
corpora = st.lists(ids.map(lambda d: [*d, EOD]), min_size=1, max_size=40)
sentences = st.lists(st.lists(st.integers(2, VOCAB - 1), max_size=4), max_size=4)
few = settings(max_examples=25)


class PlainTokenizer(Tokenizer):
    """Ids as words, for tests."""

    digest, vocab_size, eod, special_texts = "ab" * 32, VOCAB, EOD, ()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def _piece(self, i: int) -> str:
        return str(i)

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


TOKENIZER = PlainTokenizer()


def other_tokenizer(**change: Any) -> Tokenizer:
    found = PlainTokenizer()
    for name, value in change.items():
        setattr(found, name, value)
    return found


def build(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = VOCAB,
    min_tokens: int = MIN_TOKENS,
    kept: dict[str, list[str]] | None = None,
    sources: tuple[Source, ...] = SOURCES,
    rows_sources: Sequence[int] | None = None,
    **facts: Any,
) -> IndexedDataset:
    """One build; document i is record i + 1 of its source, which alternates by default."""
    dtype = np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)
    defaults = dict(
        append_eod=True, made_by="preprocess", split="", split_shares="", split_salt="",
        tokenizer_digest=TOKENIZER.digest, eod=EOD, bad_records=0,
    )  # fmt: skip
    names = tuple(kept or ())
    with (
        tempfile.TemporaryDirectory(dir=prefix.parent) as folder,
        closing(
            StagedDataset(Path(folder) / "w", prefix=prefix, vocab_size=vocab_size, kept=names)
        ) as staged,
    ):
        tokens = np.concatenate([np.asarray(d, dtype) for d in documents]).tobytes()
        rows = provenance_of(tokens, np.array([len(d) for d in documents]), dtype=dtype)
        count = len(documents)
        chosen = [i % len(sources) for i in range(count)] if rows_sources is None else rows_sources
        columns = [chosen, range(1, count + 1), *rows.columns[2:], *(kept or {}).values()]
        staged.append(tokens, batch_of(columns, names))
        staged.stage(min_tokens=min_tokens, sources=sources, **defaults | facts)  # type: ignore[arg-type]
        staged.publish()
    return IndexedDataset(prefix)


def megatron_build(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: type = np.uint16
) -> None:
    """Megatron's own builder; a document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        flat = np.array([i for s in document for i in s], dtype)
        builder.add_document(flat, [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")


def texts(prefix: Path) -> Documents:
    dataset = IndexedDataset(prefix)
    found = [d.tolist() for d in dataset.documents()]
    assert found == [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    dataset.close()
    return found


def theirs(prefix: Path) -> Documents:
    """The documents by Megatron's own reader."""
    dataset = MegatronDataset(str(prefix))
    borders = dataset.document_indices.tolist()
    found = [
        np.concatenate([dataset[s] for s in range(a, b)]).tolist() for a, b in pairwise(borders)
    ]
    del dataset
    return found


def rows_of(prefix: Path) -> list[dict[str, Any]]:
    return pq.read_table(f"{prefix}.documents.parquet").to_pylist()


def part(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def alter(path: Path, at: int, data: bytes | None = None) -> None:
    """Overwrite bytes; without data, flip the lowest bit of one."""
    content = bytearray(path.read_bytes())
    data = bytes([content[at] ^ 1]) if data is None else data
    content[at : at + len(data)] = data
    path.write_bytes(content)


@contextmanager
def small_pieces() -> Iterator[None]:
    """Borders of pieces and chunks fall everywhere."""
    with (
        mock.patch.object(pieces, "READ_BYTES", 16),
        mock.patch.object(layout, "CHUNK", 8),
        mock.patch.object(rows, "ROW_GROUP", 5),
    ):
        yield


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name, small_pieces():
        yield Path(name)


# --- adopt


@few
@given(st.lists(sentences, min_size=1, max_size=30), st.booleans(), st.sampled_from([4, 8]))
def test_megatrons_files_are_adopted_and_read_whatever_their_sequences(
    corpus: list[list[list[int]]], append_eod: bool, code: int
) -> None:
    corpus = [[*d, [2, EOD if append_eod else 2]] for d in corpus]
    dtype = np.uint16 if code == 8 else np.int32
    with folder() as tmp:
        megatron_build(tmp / "d", corpus, dtype)
        before = [(tmp / name).read_bytes() for name in ("d.bin", "d.idx")]
        manifest = adopt(tmp / "d", TOKENIZER, min_tokens=MIN_TOKENS)
        assert [(tmp / name).read_bytes() for name in ("d.bin", "d.idx")] == before
        flat = [[i for s in d for i in s] for d in corpus]
        assert texts(tmp / "d") == theirs(tmp / "d") == flat
        assert (manifest.append_eod, manifest.dtype) == (append_eod, np.dtype(dtype).name)
        assert (manifest.made_by, manifest.eod, manifest.vocab_size) == ("adopt", EOD, VOCAB)
        rows = rows_of(tmp / "d")
        assert {(r["source"], r["record"], r["text_xxh3_64"]) for r in rows} == {(-1, -1, 0)}
        assert [r["tokens"] for r in rows] == [len(d) for d in flat]
        members = load_mask(tmp / "d.eligible").members().tolist()
        assert members == [len(d) - append_eod >= MIN_TOKENS for d in flat]
        report = verify(tmp / "d", TOKENIZER)
        assert (report.documents, report.eligible) == (len(flat), sum(members))
        assert names(tmp) == sorted(f"d{suffix}" for suffix in PARTS)


@few
@given(corpora)
def test_what_adopt_makes_is_what_one_build_makes_but_for_the_origin(corpus: Documents) -> None:
    with folder() as tmp:
        build(tmp / "ours", corpus)
        megatron_build(tmp / "theirs", [[d] for d in corpus])
        adopt(tmp / "theirs", TOKENIZER, min_tokens=MIN_TOKENS)
        for suffix in (".bin", ".idx", ".eligible"):
            assert (
                part(tmp / "ours", suffix).read_bytes() == part(tmp / "theirs", suffix).read_bytes()
            )
        ours, adopted = rows_of(tmp / "ours"), rows_of(tmp / "theirs")
        assert [r["tokens_xxh3_64"] for r in ours] == [r["tokens_xxh3_64"] for r in adopted]
        first, second = (load_manifest(tmp / f"{n}.manifest.json") for n in ("ours", "theirs"))
        assert first.data_digest == second.data_digest


@few
@given(corpora)
def test_our_files_are_read_by_megatron(corpus: Documents) -> None:
    with folder() as tmp:
        build(tmp / "d", corpus)
        assert theirs(tmp / "d") == texts(tmp / "d") == corpus


def test_adopt_finds_the_names_that_megatron_gives(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"d\.idx, .*d_text_document\.idx, .*none of them exists"):
        find_prefix(tmp_path / "d")
    megatron_build(tmp_path / "d_text_document", [[[5, EOD]]])
    assert find_prefix(tmp_path / "d") == tmp_path / "d_text_document"
    adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    assert texts(tmp_path / "d_text_document") == [[5, EOD]]
    megatron_build(tmp_path / "d_text_sentence", [[[5, EOD]]])
    with pytest.raises(ValueError, match="both exist"):
        find_prefix(tmp_path / "d")
    megatron_build(tmp_path / "d", [[[6, EOD]]])
    assert find_prefix(tmp_path / "d") == tmp_path / "d"
    with pytest.raises(ValueError, match="object store; copy"):
        find_prefix("s3://bucket/d")


def test_adopt_refuses_a_dataset_of_ours(tmp_path: Path) -> None:
    build(tmp_path / "d", [[5, EOD]])
    with pytest.raises(ValueError, match=r"d\.manifest\.json exists"):
        adopt(tmp_path / "d", TOKENIZER, min_tokens=1)


REFUSED: dict[str, tuple[list[list[list[int]]], str]] = {
    "some end with the eod": (
        [[[5, EOD]], [[6]], [[7], [8]], [[9, EOD]]],
        r"2 of 4 documents end with .* 1, the first that does not is document 1 \(bytes 4:6\)",
    ),
    "no sequence": ([[[5, EOD]], [], [[6, EOD]]], "document 1 is empty: it has no sequence"),
    "no token": ([[[5, EOD]], [[6, EOD]], [[], []]], "document 2 is empty: it has no token"),
    "no document": ([], "has no document"),
    "an id too large": (
        [[[5, EOD]], [[6], [7, VOCAB, EOD]]],
        rf"document 1 has token id {VOCAB} at byte 8, but ids must lie in \[0, {VOCAB}\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adopt_names_the_first_document_it_cannot_take_and_writes_nothing(
    tmp_path: Path, case: str
) -> None:
    documents, message = REFUSED[case]
    megatron_build(tmp_path / "d", documents)
    with small_pieces(), pytest.raises(ValueError, match=message):
        adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    assert names(tmp_path) == ["d.bin", "d.idx"]


def test_adopt_checks_negative_ids_and_a_padded_vocabulary(tmp_path: Path) -> None:
    megatron_build(tmp_path / "d", [[[5, EOD]], [[-7, EOD]]], np.int32)
    with pytest.raises(ValueError, match="document 1 has token id -7 at byte 8"):
        adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    megatron_build(tmp_path / "p", [[[VOCAB + 5, EOD]]])
    assert adopt(tmp_path / "p", TOKENIZER, min_tokens=1, vocab_size=VOCAB + 6).vocab_size == 306
    with pytest.raises(ValueError, match=r"document 0 .* has token id 305.*\[0, 300\)"):
        verify(tmp_path / "p", TOKENIZER)
    verify(tmp_path / "p", None)
    megatron_build(tmp_path / "q", [[[5, EOD]]])
    with pytest.raises(ValueError, match=r"vocab_size is 1, but .*end-of-document id is 1"):
        adopt(tmp_path / "q", TOKENIZER, min_tokens=1, vocab_size=1)
    with pytest.raises(ValueError, match="min_tokens is -1"):
        adopt(tmp_path / "q", TOKENIZER, min_tokens=-1)


# --- lying indexes: four documents of sequences (5 1), (6 1) (7 1), (8 1), (9 1)

S, D = 5, 4


def header(**change: Any) -> bytes:
    facts = {"magic": b"MMIDIDX\x00\x00", "version": 1, "code": 8, "s": S, "d": D + 1} | change
    return HEADER.pack(*facts.values())


LIES: dict[str, tuple[str, int, bytes, str]] = {
    # part, offset, bytes put there, message
    "magic": ("idx", 0, b"MMIDIDY", "is no Megatron index header"),
    "version": ("idx", 0, header(version=2), "is no Megatron index header"),
    "2^60 sequences": ("idx", 0, header(s=2**60), f"{2**60} sequences and 4 documents need"),
    "2^60 documents": ("idx", 0, header(d=2**60), f"5 sequences and {2**60 - 1} documents need"),
    "no borders": ("idx", 0, header(d=0), "is no Megatron index header"),
    "2^64 sequences": ("idx", 0, header(s=2**64 - 1), "documents need"),
    "int64": ("idx", 0, header(code=5), r"token ids are int64 \(type code 5\)"),
    "float32": ("idx", 0, header(code=7), r"token ids are float32 \(type code 7\)"),
    "unknown type": ("idx", 0, header(code=99), "type code 99 is neither"),
    "int32 of uint16": ("idx", 0, header(code=4), "document 1 has sequence 1 at byte 4, but the"),
    "negative length": (
        "idx", 34 + 4 * 2, struct.pack("<i", -2), "document 1 has sequence 2 of -2 tokens",
    ),
    "long sequence": (
        "idx", 34 + 4 * 4, struct.pack("<i", 2**31 - 1), r"d\.bin has 20 bytes, but .* end at byte",
    ),
    "long sequence in the middle": (
        "idx", 34 + 4, struct.pack("<i", 2**31 - 1),
        "document 1 has sequence 2 at byte 8, but the lengths of those before it end at",
    ),
    "pointer beyond the file": (
        "idx", 34 + 4 * S + 8 * 3, struct.pack("<q", 2**50),
        f"document 2 has sequence 3 at byte {2**50}, but .* before it end at byte 12",
    ),
    "negative pointer": (
        "idx", 34 + 4 * S, struct.pack("<q", -4), "document 0 has sequence 0 at byte -4",
    ),
    "border beyond the sequences": (
        "idx", 34 + 12 * S + 8 * 2, struct.pack("<q", 2**60),
        f"document 1 has the borders 1 and {2**60}, which must ascend and not pass the 5",
    ),
    "descending borders": (
        "idx", 34 + 12 * S + 8 * 3, struct.pack("<q", 2),
        "document 2 has the borders 3 and 2, which must ascend",
    ),
    "negative border": (
        "idx", 34 + 12 * S + 8 * 2, struct.pack("<q", -1), "document 1 has the borders 1 and -1",
    ),
    "first border": (
        "idx", 34 + 12 * S, struct.pack("<q", -1), "document 0 begins at sequence -1",
    ),
    "last border": (
        "idx", 34 + 12 * S + 8 * 3, struct.pack("<qq", 3, 4), "document 2 is empty: .* 3 and 3",
    ),
    "too few": (
        "idx", 34 + 12 * S, struct.pack("<qqqqq", 0, 1, 2, 3, 4),
        "document 3 is the last and ends at sequence 4, but there are 5",
    ),
}  # fmt: skip


@contextmanager
def little_memory(limit: int = 4 << 20) -> Iterator[None]:
    """The block allocates less than `limit` bytes at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def lying(prefix: Path) -> None:
    megatron_build(prefix, [[[5, 1]], [[6, 1], [7, 1]], [[8, 1]], [[9, 1]]])


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize("small", [False, True])
def test_an_index_that_lies_is_an_error_in_little_memory(
    tmp_path: Path, case: str, small: bool
) -> None:
    suffix, at, data, message = LIES[case]
    lying(tmp_path / "d")
    alter(tmp_path / f"d.{suffix}", at, data)
    with little_memory(), pytest.raises(ValueError, match=message):
        if small:
            with mock.patch.object(layout, "CHUNK", 2):
                adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
        else:
            adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    assert names(tmp_path) == ["d.bin", "d.idx"]


@pytest.mark.parametrize("size", [0, 1, 33, 34, 35, 100])
def test_an_index_of_any_other_size_is_an_error(tmp_path: Path, size: int) -> None:
    lying(tmp_path / "d")
    os.truncate(tmp_path / "d.idx", size)
    with pytest.raises(ValueError, match=r"no Megatron index header|has \d+ bytes, but 5"):
        adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    assert names(tmp_path) == ["d.bin", "d.idx"]


@pytest.mark.parametrize("size", [0, 19, 21, 1000])
def test_a_bin_of_any_other_size_is_an_error(tmp_path: Path, size: int) -> None:
    lying(tmp_path / "d")
    os.truncate(tmp_path / "d.bin", size)
    with pytest.raises(ValueError, match=rf"d\.bin has {size} bytes, but the .* end at byte 20"):
        adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(ValueError, match=r"d\.bin cannot be read"):
        adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    assert names(tmp_path) == ["d.idx"]


def test_a_document_of_too_many_tokens_is_refused_before_it_is_read(tmp_path: Path) -> None:
    megatron_build(tmp_path / "d", [[[5]], [[6]] * 3])
    alter(tmp_path / "d.idx", 34, struct.pack("<iiii", 1, 2**30, 2**30, 1))
    starts = (0, 2, 2 + 2**31, 2 + 2**32)
    alter(tmp_path / "d.idx", 34 + 16, struct.pack("<qqqq", *starts))
    os.truncate(tmp_path / "d.bin", 2**32 + 4)  # sparse
    with little_memory(), pytest.raises(ValueError, match=f"document 1 has {2**31 + 1} tokens"):
        adopt(tmp_path / "d", TOKENIZER, min_tokens=1)


@few
@given(st.data())
def test_a_damaged_byte_of_an_index_is_never_taken_for_granted(data: st.DataObject) -> None:
    with folder() as tmp:
        lying(tmp / "d")
        size = (tmp / "d.idx").stat().st_size
        at = data.draw(st.integers(0, size - 1))
        value = data.draw(st.integers(0, 255))
        changed = (tmp / "d.idx").read_bytes()[at] != value
        alter(tmp / "d.idx", at, bytes([value]))
        try:
            adopt(tmp / "d", TOKENIZER, min_tokens=1)
        except ValueError:
            assert changed and names(tmp) == ["d.bin", "d.idx"]
        else:  # other borders of documents can be as true
            assert not changed or at >= 34 + 12 * S
            assert list(chain(*texts(tmp / "d"))) == [5, 1, 6, 1, 7, 1, 8, 1, 9, 1]


# --- verify


def corpus(count: int = 30) -> Documents:
    rng = np.random.default_rng(1)
    return [[*rng.integers(2, VOCAB, n).tolist(), EOD] for n in rng.integers(1, 9, count)]


CORPUS = corpus()
STARTS = np.cumsum([0, *(2 * len(d) for d in CORPUS)]).tolist()


def told(i: int, *, place: bool = True) -> str:
    """What an error says of document i of `build(CORPUS)`."""
    where = f", from {SOURCES[i % 2].path}:{i + 1}" if place else ""
    return rf"document {i} \(bytes {STARTS[i]}:{STARTS[i + 1]} of d\.bin{where}\)"


def test_verify_tells_what_is_whole(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    seen: list[tuple[int, int, int]] = []
    with small_pieces():
        report = verify(tmp_path / "d", None, watch=lambda *done: seen.append(done))
    assert (report.documents, report.tokens) == (30, sum(map(len, CORPUS)))
    assert report.eligible == sum(len(d) > MIN_TOKENS for d in CORPUS)
    assert (report.masks, report.tokenizer_checked) == ((), False)
    assert seen[-1] == (30, STARTS[-1], STARTS[-1]) and seen == sorted(set(seen))
    assert verify(tmp_path / "d", TOKENIZER).tokenizer_checked


@few
@given(st.integers(0, STARTS[-1] - 1), st.integers(0, STARTS[-1] - 1))
def test_verify_names_the_first_document_with_an_altered_byte(first: int, second: int) -> None:
    with folder() as tmp:
        build(tmp / "d", CORPUS)
        for at in {first, second}:
            alter(tmp / "d.bin", at)
        i = int(np.searchsorted(STARTS, min(first, second), side="right")) - 1
        with pytest.raises(ValueError, match=rf"d\.bin: {told(i)} differs"):
            verify(tmp / "d", None)


@few
@given(st.integers(0, STARTS[-1] - 1), st.booleans())
def test_verify_names_the_first_document_that_a_truncated_bin_cuts(size: int, also: bool) -> None:
    with folder() as tmp:
        build(tmp / "d", CORPUS)
        os.truncate(tmp / "d.bin", size)
        i = int(np.searchsorted(STARTS, size, side="right")) - 1
        message = rf"d\.bin: {told(i)} is the first that is not whole: .* {size} bytes"
        if also and i > 0:
            alter(tmp / "d.bin", 0)
            message = rf"d\.bin: {told(0)} differs"
        with pytest.raises(ValueError, match=message):
            verify(tmp / "d", None)


def test_verify_sees_a_longer_bin_and_a_missing_one(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    with open(tmp_path / "d.bin", "ab") as stream:
        stream.write(b"xy")
    with pytest.raises(ValueError, match=r"d\.bin has \d+ bytes, 2 more than its documents"):
        verify(tmp_path / "d", None)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(ValueError, match=r"d\.bin cannot be read"):
        verify(tmp_path / "d", None)


@few
@given(st.sampled_from(["length", "pointer", "border"]), st.integers(0, 29), st.integers(-3, 3))
def test_verify_names_the_first_document_that_an_altered_index_moves(
    array: str, i: int, by: int
) -> None:
    with folder() as tmp:
        build(tmp / "d", CORPUS)
        index = IndexedDataset(tmp / "d").index
        size, found, start, kind, first = {
            "length": (4, index.lengths, 34, "<i", i),
            "pointer": (8, index.pointers, 34 + 4 * 30, "<q", i),
            "border": (8, index.borders, 34 + 12 * 30, "<q", max(i - 1, 0)),
        }[array]
        value = int(found[i]) + (by or 1)
        alter(tmp / "d.idx", start + size * i, struct.pack(kind, value))
        with pytest.raises(ValueError, match=rf"d\.idx: {told(first)} "):
            verify(tmp / "d", None)
        (tmp / "d.documents.parquet").unlink()
        with pytest.raises(ValueError, match=r"d\.idx: document \d+ (has|is|beg)"):
            verify(tmp / "d", None)


@few
@given(st.integers(0, 34 + 12 * 30 + 8 * 31 - 1))
def test_verify_names_the_first_document_that_a_truncated_index_loses(size: int) -> None:
    with folder() as tmp:
        build(tmp / "d", CORPUS)
        os.truncate(tmp / "d.idx", size)
        i = max(0, (size - 34 - 12 * 30) // 8 - 1)
        with pytest.raises(ValueError, match=rf"d\.idx: {told(i)} is the first that cannot be f"):
            verify(tmp / "d", None)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"X", "is no Megatron index header"),
        (17, b"\x04", "header says 30 documents of int32, but the manifest 30 of uint16"),
        (None, b"x", "1 more than its manifest"),
    ],
)
def test_verify_sees_another_index(
    tmp_path: Path, at: int | None, data: bytes, message: str
) -> None:
    build(tmp_path / "d", CORPUS)
    path = tmp_path / "d.idx"
    alter(path, path.stat().st_size if at is None else at, data)
    with pytest.raises(ValueError, match=message):
        verify(tmp_path / "d", None)
    path.unlink()
    with pytest.raises(ValueError, match=r"d\.idx cannot be read"):
        verify(tmp_path / "d", None)


def test_verify_sees_other_sequences_in_the_same_documents(tmp_path: Path) -> None:
    megatron_build(tmp_path / "d", [[[5, EOD]], [[6], [7, EOD]]])
    megatron_build(tmp_path / "e", [[[5, EOD]], [[6, 7], [EOD]]])
    adopt(tmp_path / "d", TOKENIZER, min_tokens=1)
    (tmp_path / "e.idx").replace(tmp_path / "d.idx")
    with pytest.raises(ValueError, match=r"d\.idx has another digest .* of no document can b"):
        verify(tmp_path / "d", None)


def altered_rows(prefix: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = f"{prefix}.documents.parquet"
    pq.write_table(change(pq.read_table(path)), path, row_group_size=7)


def with_value(name: str, i: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[i] = value
        field = table.schema.field(name)
        return table.set_column(
            table.schema.get_field_index(name), field, pa.array(values, field.type)
        )

    return change


ROWS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "digest": (with_value("tokens_xxh3_64", 12, 5), told(12) + " differs from the digest in its r"),
    "tokens": (with_value("tokens", 12, 77), told(12) + r" has \d tokens, but its row says 77"),
    "source": (
        with_value("source", 12, 2), told(12, place=False) + " has source 2 in its row, .* are 2",
    ),
    "negative source": (with_value("source", 12, -2), told(12, place=False) + " has source -2"),
    "null": (with_value("record", 12, None), "document 12 has no record"),
    "fewer": (lambda t: t.slice(1), "has 29 rows, but there are 30"),
    "more": (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "has 31 rows"),
    "column": (lambda t: t.drop_columns(["record"]), "has the columns source int32, tokens"),
    "type": (lambda t: t.set_column(2, "tokens", t["tokens"].cast(pa.int64())), ".*, tokens int64"),
    "swapped": (
        lambda t: t.take([0, 1, 3, 2, *range(4, 30)]),
        rf"document 2 \(bytes {STARTS[2]}:{STARTS[3]} of d.bin, from b.jsonl:4\) (has|differs)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_verify_names_the_first_row_that_is_not_its_documents(tmp_path: Path, case: str) -> None:
    build(tmp_path / "d", CORPUS)
    change, message = ROWS[case]
    altered_rows(tmp_path / "d", change)
    with small_pieces(), pytest.raises(ValueError, match=rf"d\.documents\.parquet:? ?{message}"):
        verify(tmp_path / "d", None)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_verify_sees_a_parquet_file_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    build(tmp_path / "d", CORPUS)
    path = tmp_path / "d.documents.parquet"
    data = path.read_bytes()
    damages = {"missing": b"", "empty": b"", "truncated": data[:-9], "garbage": b"PAR1" * 50}
    path.write_bytes(damages[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=r"d\.documents\.parquet cannot be read"):
        verify(tmp_path / "d", None)


def test_verify_sees_bin_and_rows_altered_alike(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    build(tmp_path / "e", [[7, *CORPUS[0][1:]], *CORPUS[1:]])
    for suffix in (".bin", ".documents.parquet"):
        part(tmp_path / "e", suffix).replace(part(tmp_path / "d", suffix))
    with pytest.raises(ValueError, match=r"d\.bin has another digest .* each document agrees"):
        verify(tmp_path / "d", None)


@few
@given(st.integers(0, 29))
def test_verify_names_the_first_document_that_an_altered_mask_gets_wrong(i: int) -> None:
    with folder() as tmp:
        build(tmp / "d", CORPUS)
        path = tmp / "d.eligible"
        at = path.stat().st_size - 64 + i // 8
        alter(path, at, bytes([path.read_bytes()[at] ^ (1 << i % 8)]))
        verb = "is not in" if len(CORPUS[i]) > MIN_TOKENS else "is in"
        with pytest.raises(ValueError, match=rf"eligible: document {i} of \d+ tokens {verb} the"):
            verify(tmp / "d", None)


def test_verify_names_the_first_of_several_documents_in_the_wrong(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    path = tmp_path / "d.eligible"
    start = path.stat().st_size - 64
    for at, bits in ((1, 0b0010_0100), (3, 1)):
        alter(path, start + at, bytes([path.read_bytes()[start + at] ^ bits]))
    with pytest.raises(ValueError, match=r"eligible: document 10 of"):
        verify(tmp_path / "d", None)


def test_verify_sees_any_other_damage_of_a_mask(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    path = tmp_path / "d.eligible"
    good = path.read_bytes()
    start = len(good) - 64 - 16
    selected = load_mask(path).num_selected
    less = good.replace(b'"min_tokens":3', b'"min_tokens":1')
    text = b'"selected":%d' % selected
    damages = {
        r"document \d+ of [23] tokens is not in the mask, against its rule of 2": less,
        "the bitmap was altered": good[: start + 8] + b"\x01" + good[start + 9 :],
        "its header says 1.* documents, its bits": good.replace(text, b'"selected":1' + b" "),
        "has .* bytes, but 30 documents need": good[:-1],
        "does not begin a mask": b"X" + good[1:],
        "bits behind the last document": good[:-1] + b"\x80",
    }
    for message, data in damages.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            verify(tmp_path / "d", None)
    path.unlink()
    with pytest.raises(ValueError, match=r"d\.eligible cannot be read"):
        verify(tmp_path / "d", None)


def test_no_document_outside_a_dataset_is_in_its_mask(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    mask = load_mask(tmp_path / "d.eligible")
    assert [i in mask for i in range(30)] == mask.members().tolist()
    assert not any(i in mask for i in (-1, -64, 30, 512, 10**9))


def test_verify_checks_the_masks_beside_a_dataset_and_those_alone(tmp_path: Path) -> None:
    digest = build(tmp_path / "d", CORPUS).manifest.idx_xxh3_128
    build(tmp_path / "d.v2", CORPUS[:9])  # its d.v2.eligible is not a mask of d
    (tmp_path / "d.notes").write_text("no mask")
    members = np.array([len(d) > MIN_TOKENS for d in CORPUS])
    members[np.flatnonzero(members)[0]] = False

    def save(mask: np.ndarray, idx_xxh3_128: str) -> None:
        found = mask_of(mask, min_tokens=MIN_TOKENS, rule="r", idx_xxh3_128=idx_xxh3_128)
        found.save(tmp_path / "d.code")

    save(members, digest)
    assert verify(tmp_path / "d", None).masks == ("d.code",)
    short = next(i for i, d in enumerate(CORPUS) if len(d) <= MIN_TOKENS)
    members[short] = True
    save(members, digest)
    with pytest.raises(ValueError, match=rf"d\.code: document {short} of .* is in the mask, whose"):
        verify(tmp_path / "d", None)
    members[short] = False
    save(members, "other")
    with pytest.raises(ValueError, match=r"d\.code is a mask of 30 documents of the index"):
        verify(tmp_path / "d", None)
    save(members, digest)
    alter(tmp_path / "d.code", (tmp_path / "d.code").stat().st_size - 64)
    with pytest.raises(ValueError, match=r"d\.code: the bitmap was altered"):
        verify(tmp_path / "d", None)


def test_a_bin_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)

    def watch(documents: int, done_bytes: int, total_bytes: int) -> None:
        os.truncate(tmp_path / "d.bin", STARTS[20] + 1)

    with small_pieces(), pytest.raises(ValueError, match=r"could be read at byte \d+, where docu"):
        verify(tmp_path / "d", None, watch=watch)


def test_verify_checks_ids_and_ends_though_all_digests_agree(tmp_path: Path) -> None:
    documents = [list(d) for d in CORPUS]
    documents[17][0] = VOCAB
    build(tmp_path / "d", documents)
    with small_pieces(), pytest.raises(ValueError, match=told(17) + f" has token id {VOCAB} at b"):
        verify(tmp_path / "d", None)
    documents[14][-1] = 9
    build(tmp_path / "d", documents)
    with pytest.raises(ValueError, match=told(14) + " ends with token id 9, but must with eod 1"):
        verify(tmp_path / "d", None)
    build(tmp_path / "d", CORPUS)
    for change, message in (
        ({"digest": "cd" * 32}, "another tokenizer"),
        ({"eod": 2}, "eod is 1 in the manifest, but 2 in the tokenizer"),
        ({"vocab_size": 200}, r"has token id 2\d\d at byte .* \[0, 200\)"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(tmp_path / "d", other_tokenizer(**change))


def test_verify_needs_a_manifest_that_speaks_of_these_files(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    path = tmp_path / "d.manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"tokens": good["tokens"] + 1}))
    with pytest.raises(ValueError, match=r"but the manifest says \d+ tokens"):
        verify(tmp_path / "d", None)
    path.unlink()
    with pytest.raises(ValueError, match=r"d\.manifest\.json cannot be read.*adopt"):
        verify(tmp_path / "d", None)


# --- merge


@few
@given(st.lists(corpora, min_size=1, max_size=4))
def test_merging_is_one_build_of_all_documents(inputs: list[Documents]) -> None:
    with folder() as tmp:
        shards, kept, sources, rows = [], [], [], []
        for n, documents in enumerate(inputs):
            labels = [f"{n}.{i}" for i in range(len(documents))]
            mine = SOURCES if n % 2 == 0 else SOURCES[:1]
            chosen = [i % (len(mine) + 1) - 1 for i in range(len(documents))]
            build(
                tmp / f"s{n}", documents, kept={"url": labels}, sources=mine, rows_sources=chosen,
                bad_records=n,
            )  # fmt: skip
            rows += [s + len(sources) if s >= 0 else -1 for s in chosen]
            sources += mine
            kept += labels
            shards.append(tmp / f"s{n}")
        manifest = merge(shards, tmp / "all")
        together = [d for documents in inputs for d in documents]
        megatron_build(tmp / "one", [[d] for d in together])
        for suffix in (".bin", ".idx"):
            one, merged = part(tmp / "one", suffix), part(tmp / "all", suffix)
            assert one.read_bytes() == merged.read_bytes()
        build(
            tmp / "one", together, kept={"url": kept}, sources=tuple(sources), rows_sources=rows,
        )  # fmt: skip
        assert part(tmp / "all", ".eligible").read_bytes() == (tmp / "one.eligible").read_bytes()
        merged, one = rows_of(tmp / "all"), rows_of(tmp / "one")
        for row in (*merged, *one):
            del row["record"]  # of its shard
        assert merged == one
        assert manifest.made_by == "merge" and manifest.sources == tuple(sources)
        assert manifest.bad_records == sum(range(len(inputs)))
        assert theirs(tmp / "all") == together
        verify(tmp / "all", TOKENIZER)
        assert not (tmp / "all.partial").exists()


def test_merging_adopted_int32_shards_of_a_small_vocabulary_keeps_their_type(
    tmp_path: Path,
) -> None:
    megatron_build(tmp_path / "a", [[[5], [6, EOD]]], np.int32)
    megatron_build(tmp_path / "b", [[[7, EOD]]], np.int32)
    for name in "ab":
        adopt(tmp_path / name, TOKENIZER, min_tokens=1)
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c").dtype == "int32"
    megatron_build(tmp_path / "one", [[[5, 6, EOD]], [[7, EOD]]], np.int32)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"c.{suffix}").read_bytes()
    assert {r["source"] for r in rows_of(tmp_path / "c")} == {-1}
    parts = split(tmp_path / "c", tmp_path / "p", parse_split("x=1"))
    assert parts["x"].dtype == "int32" and texts(tmp_path / "p_x") == [[5, 6, EOD], [7, EOD]]


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "tokenizer_digest": ({"tokenizer_digest": "cd" * 32}, "tokenizer_digest is 'abab.*but 'cdcd"),
    "vocab_size": ({"vocab_size": 301}, "vocab_size is 300 in .*a, but 301 in .*b"),
    "dtype": ({"vocab_size": 70_000}, "vocab_size is 300 in .*a, but 70000 in .*b"),
    "eod": ({"eod": 2}, "eod is 1 in .*a, but 2 in .*b"),
    "append_eod": ({"append_eod": False}, "append_eod is True in .*a, but False in .*b"),
    "kept": ({"kept": {"url": ["x"] * 30}}, r"kept columns is \[\] in .*a, but \['url'\] in .*b"),
    "min_tokens": ({"min_tokens": 4}, "min_tokens is 3 in .*a, but 4 in .*b; .*--min-tokens"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_merging_what_differs_names_field_and_values(tmp_path: Path, case: str) -> None:
    change, message = DIFFERENT[case]
    build(tmp_path / "a", CORPUS)
    build(tmp_path / "b", CORPUS, **change)
    before = names(tmp_path)
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert names(tmp_path) == before


def test_merging_an_adopted_int32_with_a_uint16_dataset_names_dtype(tmp_path: Path) -> None:
    build(tmp_path / "a", CORPUS)
    megatron_build(tmp_path / "b", [CORPUS], np.int32)
    adopt(tmp_path / "b", TOKENIZER, min_tokens=MIN_TOKENS)
    with pytest.raises(ValueError, match=r"dtype is 'uint16' in .*a, but 'int32' in .*b"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_merging_takes_min_tokens_and_keeps_a_common_split(tmp_path: Path) -> None:
    for name, min_tokens in (("a", 3), ("b", 4)):
        build(
            tmp_path / name, CORPUS, min_tokens=min_tokens, split="train",
            split_shares="train=1,test=1", split_salt=name,
        )  # fmt: skip
    manifest = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", min_tokens=5)
    mask = load_mask(tmp_path / "c.eligible")
    assert mask.header.min_tokens == 5
    assert mask.num_selected == 2 * sum(len(d) > 5 for d in CORPUS)
    assert (manifest.split, manifest.split_shares, manifest.split_salt) == ("", "", "")
    manifest = merge([tmp_path / "a", tmp_path / "a"], tmp_path / "e")
    assert (manifest.split, manifest.split_salt) == ("train", "a")
    with pytest.raises(ValueError, match="min_tokens is -1"):
        merge([tmp_path / "a"], tmp_path / "f", min_tokens=-1)
    with pytest.raises(ValueError, match="no dataset to merge"):
        merge([], tmp_path / "f")


WORK: dict[str, Callable[[Path], Any]] = {
    "merge": lambda tmp: merge([tmp / "a", tmp / "a"], tmp / "c"),
    "split": lambda tmp: split(tmp / "a", tmp / "c", parse_split("x=1,y=1")),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("damage", [".bin", ".documents.parquet", ".idx", "short"])
def test_a_damaged_input_leaves_no_output(tmp_path: Path, work: str, damage: str) -> None:
    build(tmp_path / "a", CORPUS)
    if damage == ".documents.parquet":
        altered_rows(tmp_path / "a", with_value("tokens_xxh3_64", 22, 5))
    elif damage == "short":
        os.truncate(tmp_path / "a.bin", STARTS[22])
    else:
        alter(part(tmp_path / "a", damage), STARTS[22])
    message = (
        "another digest|a.bin has" if damage in (".idx", "short") else "document 22 is not the"
    )
    before = names(tmp_path)
    with small_pieces(), pytest.raises(ValueError, match=message):
        WORK[work](tmp_path)
    assert names(tmp_path) == before


@pytest.mark.parametrize("work", WORK)
def test_an_existing_output_is_kept(tmp_path: Path, work: str) -> None:
    build(tmp_path / "a", CORPUS)
    taken = {"merge": "c.bin", "split": "c_y.idx"}[work]
    (tmp_path / taken).write_text("mine")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=f"{taken} exists already"):
        WORK[work](tmp_path)
    assert names(tmp_path) == before and (tmp_path / taken).read_text() == "mine"


def test_the_working_folder_is_one_process_and_never_an_unfinished_run(tmp_path: Path) -> None:
    build(tmp_path / "a", CORPUS)
    partial = tmp_path / "c.partial"
    with output_folder(tmp_path / "c"):
        with pytest.raises(ValueError, match=r"c\.partial: another process"):
            WORK["merge"](tmp_path)
        assert partial.is_dir()
    assert not partial.exists()
    partial.mkdir()
    (partial / "dataset.bin").write_text("left by a killed merge")
    WORK["merge"](tmp_path)
    assert not partial.exists() and verify(tmp_path / "c", None).documents == 60
    (tmp_path / "c_x.partial").mkdir()
    (tmp_path / "c_x.partial" / "journal.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished run of tools/preprocess_data"):
        merge([tmp_path / "a"], tmp_path / "c_x")
    assert (tmp_path / "c_x.partial" / "journal.json").is_file()
    descriptor = os.open(tmp_path / "c_x.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # was let go
    os.close(descriptor)


# --- split


@few
@given(corpora, st.text(max_size=3))
def test_every_document_is_in_exactly_one_part_and_duplicates_in_the_same(
    documents: Documents, salt: str
) -> None:
    shares = Split(("x", "y"), (2, 1), salt)
    documents = [*documents, *documents[::-1], *([n, EOD] for n in range(2, 40))]
    with folder() as tmp:
        build(tmp / "a", documents, kept={"n": [str(i) for i in range(len(documents))]})
        manifests = split(tmp / "a", tmp / "p", shares)
        rows = {name: rows_of(tmp / f"p_{name}") for name in "xy"}
        origin = {name: [int(r["n"]) for r in rows[name]] for name in "xy"}
        assert sorted(origin["x"] + origin["y"]) == list(range(len(documents)))
        for name in "xy":
            assert origin[name] == sorted(origin[name])
            assert theirs(tmp / f"p_{name}") == [documents[i] for i in origin[name]]
            assert [r["record"] for r in rows[name]] == [i + 1 for i in origin[name]]
            assert [r["source"] for r in rows[name]] == [i % 2 for i in origin[name]]
            verify(tmp / f"p_{name}", TOKENIZER)
            facts = manifests[name]
            assert (facts.made_by, facts.split, facts.split_shares) == ("split", name, "x=2,y=1")
            assert (facts.split_salt, facts.sources) == (salt, SOURCES)
            assert load_mask(tmp / f"p_{name}.eligible").header.min_tokens == MIN_TOKENS
        assert not {str(d) for d in texts(tmp / "p_x")} & {str(d) for d in texts(tmp / "p_y")}
        merge([tmp / "p_x", tmp / "p_y"], tmp / "m")
        split(tmp / "m", tmp / "again", shares)  # each part where it was, whatever the order
        for name in "xy":
            again = (tmp / f"again_{name}.bin").read_bytes()
            assert again == (tmp / f"p_{name}.bin").read_bytes()


def test_shares_are_kept_and_another_salt_gives_another_split() -> None:
    digests = np.random.default_rng(3).integers(0, 2**64, 20_000, dtype=np.uint64)
    first = splits_of(digests, parse_split("a=80,b=15,c=5", salt="1"))
    shares = np.bincount(first, minlength=3) / len(digests)
    assert np.abs(shares - [0.80, 0.15, 0.05]).max() < 0.01  # 3.5 standard deviations
    second = splits_of(digests, parse_split("a=80,b=15,c=5", salt="2"))
    expected = 0.80**2 + 0.15**2 + 0.05**2
    assert abs((first == second).mean() - expected) < 0.012
    huge = splits_of(digests[:9], Split(("a", "b"), (1, 10**30), "s"))
    assert huge.tolist() == [1] * 9


def test_a_part_without_documents_is_an_error_and_leaves_no_output(tmp_path: Path) -> None:
    build(tmp_path / "a", CORPUS[:2])
    before = names(tmp_path)
    with pytest.raises(ValueError, match="split 'y' gets none of the 2 documents"):
        split(tmp_path / "a", tmp_path / "c", parse_split("x=1000000,y=1"))
    assert names(tmp_path) == before


# --- memory


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(2, VOCAB, 4000).tolist(), EOD] for _ in range(1500)]  # 12 MB
    megatron_build(tmp_path / "a", [[d] for d in documents])
    del documents
    with mock.patch.object(pieces, "READ_BYTES", 1 << 18), little_memory(3 << 20):
        adopt(tmp_path / "a", TOKENIZER, min_tokens=1)
        verify(tmp_path / "a", TOKENIZER)
        split(tmp_path / "a", tmp_path / "p", parse_split("x=1,y=1"))
        merge([tmp_path / "p_x", tmp_path / "p_y"], tmp_path / "m")


# --- inspect


def test_facts_are_those_computed_by_hand(tmp_path: Path) -> None:
    documents = [[5, EOD], [6, 7, EOD], [8] * 7 + [EOD], [9] * 30 + [EOD], [5, EOD]]
    build(tmp_path / "d", documents, rows_sources=[0, 1, -1, 1, 1], kept={"url": list("abcde")})
    with small_pieces():
        facts = inspect(tmp_path / "d")
    assert (facts.manifest.documents, facts.manifest.tokens, facts.sequences) == (5, 46, 5)
    assert (facts.eligible, facts.min_tokens, facts.kept) == (2, 3, ("url",))
    assert (facts.shortest, facts.longest, facts.mean) == (2, 31, 9.2)
    assert (facts.percentiles[50], facts.percentiles[25], facts.percentiles[75]) == (3, 2, 8)
    assert facts.percentiles[90] == pytest.approx(8 + 0.6 * 23)
    found = [(b.low, b.high, b.documents, b.tokens) for b in facts.histogram]
    assert found == [(2, 4, 3, 7), (4, 8, 0, 0), (8, 16, 1, 8), (16, 32, 1, 31)]
    found = [(s.path, s.documents, s.tokens) for s in facts.sources]
    assert found == [("a.jsonl", 1, 2), ("b.jsonl", 3, 36), ("", 1, 8)]
    assert facts.bytes == {s: part(tmp_path / "d", s).stat().st_size for s in PARTS}
    assert facts.samples == () and facts.data_digest == facts.manifest.data_digest


def test_samples_are_chosen_by_the_seed_and_cut(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    first, same, other = (
        inspect(tmp_path / "d", TOKENIZER, num_samples=5, sample_tokens=3, seed=seed).samples
        for seed in (1, 1, 2)
    )
    assert first == same != other
    for sample in first:
        ids = CORPUS[sample.document]
        assert (sample.tokens, sample.whole) == (len(ids), len(ids) <= 3)
        assert sample.text == " ".join(map(str, [i for i in ids[:3] if i != EOD]))
    everything = inspect(tmp_path / "d", TOKENIZER, num_samples=99).samples
    assert [s.document for s in everything] == list(range(30))
    with pytest.raises(ValueError, match="5 samples need the tokenizer"):
        inspect(tmp_path / "d", num_samples=5)
    with pytest.raises(ValueError, match="another tokenizer"):
        inspect(tmp_path / "d", other_tokenizer(digest="cd" * 32), num_samples=1)
    with pytest.raises(ValueError, match="-1 samples"):
        inspect(tmp_path / "d", TOKENIZER, num_samples=-1)


def test_inspect_reads_a_url(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    url = f"file://{tmp_path / 'd'}"
    facts = inspect(url, TOKENIZER, num_samples=1, cache_dir=tmp_path / "cache")
    assert facts.manifest.documents == 30 and len(facts.samples) == 1


def test_inspect_sees_damage(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    altered_rows(tmp_path / "d", with_value("source", 3, 2))
    with pytest.raises(ValueError, match=r"sources 0\.\.2 must lie in \[-1, 2\)"):
        inspect(tmp_path / "d")


def shown(facts: Any, width: int = 200) -> str:
    out = io.StringIO()
    inspect_view.print_facts(
        facts, Console(file=out, force_terminal=True, color_system="standard", width=width)
    )
    return out.getvalue()


class HostileTokenizer(PlainTokenizer):
    """Every document is an attack."""

    def _decode(self, ids: list[int]) -> str:
        return (
            "[bold]x[/bold] \x1b[2J\x07\x9b1m\r\n\t\u202e\u2028 \\x1b :smile: ½ 字 [link=file:///]"
        )


def test_text_of_documents_and_names_of_files_are_shown_inert(tmp_path: Path) -> None:
    path = "\x1b]0;title\x07[red]a.jsonl"
    build(tmp_path / "d", CORPUS, sources=(Source(path=path, bytes=1),), split="\x1b[3m")
    facts = inspect(tmp_path / "d", HostileTokenizer(), num_samples=1)
    text = shown(facts)
    assert r"[bold]x[/bold] \x1b[2J\x07\x9b1m\r\n\t\u202e\u2028 \\x1b :smile: ½ 字 [link" in text
    assert r"\x1b]0;title\x07[red]a.jsonl" in text and r"\x1b[3m of" in text
    for escape in ("\x1b[2J", "\x1b]0", "\x1b[3m", "\x07", "\x9b", "\r", "\u202e", "\u2028"):
        assert escape not in text
    assert inspect_view.inert("\\n") != inspect_view.inert("\n")


def test_the_view_shows_the_histogram_and_the_json_all_facts(tmp_path: Path) -> None:
    documents = [[5, EOD]] * 90 + [[5] * 20 + [EOD]]
    build(tmp_path / "d", documents)
    facts = inspect(tmp_path / "d")
    text = shown(facts)
    assert "█" * 40 in text and "█" * 41 not in text
    assert sum("█" in line for line in text.splitlines()) == 2  # one document is seen
    found = json.loads(inspect_view.to_json(facts))
    assert found["manifest"]["documents"] == 91 and found["percentiles"]["50"] == 2
    assert found["histogram"][0] == {"low": 2, "high": 4, "documents": 90, "tokens": 180}
    many = tuple(Source(path=f"f{i}", bytes=1) for i in range(41))
    build(tmp_path / "m", documents, sources=many)
    assert "21 more" in shown(inspect(tmp_path / "m"))


def test_the_plot_is_a_png_and_names_are_no_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    build(tmp_path / "$x_{$d", CORPUS)
    facts = inspect(tmp_path / "$x_{$d")
    inspect_view.plot(facts, tmp_path / "new" / "p.png")
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert names(tmp_path / "new") == ["p.png"]
    with pytest.raises(ValueError, match=r"p\.pdf: the file name must end in \.png"):
        inspect_view.plot(facts, tmp_path / "p.pdf")
    with (
        mock.patch.dict(sys.modules, {"matplotlib.figure": None}),
        pytest.raises(ValueError, match="needs matplotlib"),
    ):
        inspect_view.plot(facts, tmp_path / "q.png")


# --- the tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    spec = importlib.util.spec_from_file_location("dataset_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dataset.py", *map(str, arguments)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    vocabulary = {"<|endoftext|>": EOD} | {f"w{i}": i for i in range(VOCAB) if i != EOD}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


def test_the_tool_adopts_verifies_splits_merges_and_inspects(
    tmp_path: Path, tool: Any, tokenizer_file: Path
) -> None:
    megatron_build(tmp_path / "d_text_document", [[d] for d in CORPUS])
    tokenizer = ("--tokenizer", tokenizer_file)
    code, out, err = tool("adopt", tmp_path / "d", *tokenizer, "--min-tokens", 3)
    assert code == 0 and "d_text_document: 30 documents" in out and "each ends with eod 1" in out
    assert "30 documents" in err and "MB/s" in err
    d = tmp_path / "d_text_document"
    code, out, _ = tool("split", d, "--output-prefix", tmp_path / "p", "--split", "x=1,y=1")
    assert code == 0 and "p_x: " in out and "p_y: " in out
    salted = ("--output-prefix", tmp_path / "q", "--split", "x=1,y=1", "--salt", "other")
    assert tool("split", d, *salted)[0] == 0
    assert (tmp_path / "p_x.bin").read_bytes() != (tmp_path / "q_x.bin").read_bytes()
    code, out, _ = tool("merge", tmp_path / "p_*", "--output", tmp_path / "m", "--min-tokens", 4)
    assert code == 0 and "m: 30 documents" in out
    code, out, _ = tool("verify", tmp_path / "p_*", tmp_path / "m", *tokenizer)
    assert code == 0 and out.count(": whole, ") == 3
    code, out, err = tool("inspect", tmp_path / "m", *tokenizer, "--samples", 2, "--seed", 3)
    assert (code, err) == (0, "") and out.count("\ndocument ") == 2 and " w" in out
    code, out, _ = tool("inspect", tmp_path / "m", "--json", "--plot", tmp_path / "p.png")
    assert code == 0 and json.loads(out)["min_tokens"] == 4 and (tmp_path / "p.png").is_file()


def test_the_tool_tells_errors_on_stderr(tmp_path: Path, tool: Any, tokenizer_file: Path) -> None:
    build(tmp_path / "a", CORPUS)
    alter(tmp_path / "a.bin", STARTS[3])
    for arguments, message in (
        (("verify", tmp_path / "a"), "document 3 (bytes"),
        (("verify", tmp_path / "x*"), "check the pattern"),
        (("verify", tmp_path / "a", "--tokenizer", tokenizer_file), "another tokenizer"),
        (("merge", tmp_path / "a", "--output", tmp_path / "a"), "exists already"),
        (("split", tmp_path / "a", "--output-prefix", "b", "--split", "x"), "must be NAME=SHARE"),
        (("inspect", tmp_path / "none"), "cannot be read"),
        (("inspect", tmp_path / "a", "--samples", 2), "need the tokenizer"),
        (("adopt", tmp_path / "a", "--tokenizer", "none", "--min-tokens", 1), "tokenizer none"),
    ):
        code, out, err = tool(*arguments)
        assert (code, out) == (1, "")
        last = err[err.rindex("error: ") :]
        assert message in last and "Traceback" not in err


@pytest.mark.parametrize("command", ["inspect", "verify", "merge", "split", "adopt"])
def test_each_command_teaches_with_an_example(
    tool: Any, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool(command, "--help")
    assert stopped.value.code == 0
    out = capfd.readouterr().out
    assert "example: " in out and f"python tools/dataset.py {command} " in out


def test_the_tool_prints_any_character_anywhere_and_imports_no_torch(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['dataset.py', 'inspect', {str(tmp_path / 'd')!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "finally:\n"
        "    import megatron_sip.data.maintenance.adopt, megatron_sip.data.maintenance.merge\n"
        "    import megatron_sip.data.maintenance.split, megatron_sip.data.maintenance.verify\n"
        "    assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, cwd=TOOL.parents[1]
    )
    assert found.returncode == 0, found.stderr.decode()
    assert b"\\u2588" in found.stdout
