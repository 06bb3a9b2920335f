"""Datasets that Megatron made are adopted; an index that lies is an error in little memory."""

from __future__ import annotations

import os
import struct
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from maintenance_helpers import (
    EOD,
    MIN_TOKENS,
    TOKENIZER,
    VOCAB,
    Documents,
    alter,
    build,
    corpora,
    few,
    folder,
    little_memory,
    megatron_build,
    names,
    part,
    rows_of,
    sentences,
    small_pieces,
    texts,
    theirs,
)

from megatron_sip.data.blended_corpus import open_corpus
from megatron_sip.data.document_mask import load_mask
from megatron_sip.data.indexed_files import HEADER
from megatron_sip.data.maintenance import layout
from megatron_sip.data.maintenance.adopt import adopt, find_prefix
from megatron_sip.data.maintenance.merge import merge
from megatron_sip.data.maintenance.verify import verify
from megatron_sip.data.manifest import PARTS, load_manifest
from megatron_sip.data.sampler import PrefixSuffixSampler


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
    megatron_build(tmp_path / "p", [[[5, EOD]], [[VOCAB + 5, EOD]]])
    padding = r"no text has an id from 300 on, --vocab-size 306 only pads; give the tokenizer"
    with pytest.raises(ValueError, match=rf"document 1 has token id 305 .*\[0, 300\); {padding}"):
        adopt(tmp_path / "p", TOKENIZER, min_tokens=1, vocab_size=VOCAB + 6)
    assert names(tmp_path) == ["d.bin", "d.idx", "p.bin", "p.idx"]
    megatron_build(tmp_path / "q", [[[5, EOD]]])
    with pytest.raises(ValueError, match=r"\[0, 4\); --vocab-size is 4, .* has 300 ids; leave it"):
        adopt(tmp_path / "q", TOKENIZER, min_tokens=1, vocab_size=4)
    with pytest.raises(ValueError, match=r"vocab_size is 1, but .*end-of-document id is 1"):
        adopt(tmp_path / "q", TOKENIZER, min_tokens=1, vocab_size=1)
    with pytest.raises(ValueError, match="min_tokens is -1"):
        adopt(tmp_path / "q", TOKENIZER, min_tokens=-1)


@pytest.mark.parametrize("vocab_size", [None, VOCAB - 50, VOCAB, VOCAB + 84])
def test_what_is_adopted_with_any_size_that_holds_its_ids_is_merged_and_trained_on(
    tmp_path: Path, vocab_size: int | None
) -> None:
    documents = [[*range(2, 2 + n), EOD] for n in range(10, 40)]
    megatron_build(tmp_path / "old", [[d] for d in documents])
    adopt(tmp_path / "old", TOKENIZER, min_tokens=10, vocab_size=vocab_size)
    build(tmp_path / "new", documents, min_tokens=10)
    first, second = (load_manifest(tmp_path / f"{n}.manifest.json") for n in ("old", "new"))
    assert (first.vocab_size, first.data_digest) == (VOCAB, second.data_digest)
    verify(tmp_path / "old", TOKENIZER)
    merge([tmp_path / "old", tmp_path / "new"], tmp_path / "both")
    for pattern in ("old", "both", "[on]*[dw]"):
        corpus = open_corpus(tmp_path / pattern, min_tokens=10, cache_dir=None)
        corpus.check_tokenizer(TOKENIZER.digest, path=Path("t"))
        sampler = PrefixSuffixSampler(
            corpus, prefix_tokens=8, min_prefix_tokens=4, suffix_tokens=6, seed=1,
            word_starts=TOKENIZER.word_starts, eod=TOKENIZER.eod,
        )  # fmt: skip
        assert [len(sampler[i].suffix_ids) for i in range(40)] == [6] * 40


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
