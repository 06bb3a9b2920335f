"""Merging is one build of all documents; splitting puts each in one part, equal ones together."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
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
    Documents,
    alter,
    altered_rows,
    build,
    corpora,
    few,
    folder,
    little_memory,
    megatron_build,
    names,
    part,
    rows_of,
    small_pieces,
    texts,
    theirs,
    with_value,
)

from megatron_sip.data.document_mask import load_mask
from megatron_sip.data.maintenance import pieces
from megatron_sip.data.maintenance.adopt import adopt
from megatron_sip.data.maintenance.merge import merge
from megatron_sip.data.maintenance.output_folder import output_folder
from megatron_sip.data.maintenance.split import split, splits_of
from megatron_sip.data.maintenance.verify import verify
from megatron_sip.data.splits import Split, parse_split

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
