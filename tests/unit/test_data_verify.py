"""Verifying names the first broken document, row or bit of a mask."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from maintenance_helpers import (
    CORPUS,
    EOD,
    MIN_TOKENS,
    SOURCES,
    STARTS,
    TOKENIZER,
    VOCAB,
    alter,
    altered_rows,
    build,
    few,
    folder,
    megatron_build,
    other_tokenizer,
    part,
    small_pieces,
    with_value,
)

from megatron_sip.data.document_mask import load_mask, mask_of
from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.maintenance.adopt import adopt
from megatron_sip.data.maintenance.verify import verify


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
