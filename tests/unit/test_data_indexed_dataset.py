"""Indexed datasets: Megatron's own bytes, exact reading, errors for damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import FACTS, stage, write_dataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from megatron_sip.data.indexed_dataset import IndexedDataset, verify_digests
from megatron_sip.data.manifest import PARTS
from megatron_sip.data.staged_dataset import StagedDataset, provenance_of

DOCUMENTS = [[5, 6, 7, 1], [8, 1], [*range(2, 60), 1]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_500, "int32")])
def test_files_are_byte_identical_to_megatrons_builder(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = write_dataset(tmp_path / "ours", DOCUMENTS, vocab_size=vocab_size)
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert (tmp_path / f"ours.{suffix}").read_bytes() == theirs
    assert ours.manifest.dtype == dtype


def test_documents_and_lengths_are_read_back(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.v1", DOCUMENTS)
    assert dataset.num_documents == 3
    assert dataset.document_lengths().tolist() == [4, 2, 59]
    for i, document in enumerate(DOCUMENTS):
        assert dataset.document(i).dtype == np.int32
        assert dataset.document(i).tolist() == document
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
            dataset.document(wrong)
    theirs = MegatronDataset(str(tmp_path / "d.v1"))  # its arrays die with it: keep it
    assert theirs[2].tolist() == DOCUMENTS[2]
    assert [d.tolist() for d in dataset.documents()] == DOCUMENTS


def test_nothing_has_its_final_name_before_publish(tmp_path: Path) -> None:
    staged = stage(tmp_path / "d", [[3, 1]])
    assert [p.name for p in tmp_path.iterdir()] == ["d.partial"]
    staged.publish()
    assert {p.name for p in tmp_path.glob("d.*") if p.is_file()} == {f"d{part}" for part in PARTS}


def test_publishing_replaces_an_older_dataset(tmp_path: Path) -> None:
    old = write_dataset(tmp_path / "d", DOCUMENTS)
    new = write_dataset(tmp_path / "d", [[9, 9, 1]])
    assert new.document(0).tolist() == [9, 9, 1]
    assert old.document(0).tolist() == DOCUMENTS[0]  # an open reader keeps the old files
    assert len(list(tmp_path.iterdir())) == len(PARTS)


def test_a_dataset_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document"):
        stage(tmp_path / "d", [])


def test_a_staged_dataset_goes_on_from_a_position_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """What was written after the position, as a killed process leaves it, is cut off."""
    write_dataset(tmp_path / "whole", DOCUMENTS)
    rows = [np.array(d, np.uint16).tobytes() for d in DOCUMENTS]

    def batch(i: int) -> pa.RecordBatch:
        return provenance_of(rows[i], np.array([len(DOCUMENTS[i])]), dtype=np.dtype(np.uint16))

    folder = tmp_path / "d.partial"
    first = StagedDataset(folder, prefix=tmp_path / "d", vocab_size=300)
    first.append(rows[0], batch(0))
    position = first.position()
    first.append(rows[2][:5], batch(2))
    first.close()
    second = StagedDataset(folder, prefix=tmp_path / "d", vocab_size=300, position=position)
    for i in (1, 2):
        second.append(rows[i], batch(i))
    second.stage(eod=1, append_eod=True, min_tokens=10, **FACTS)
    second.publish()
    for part in PARTS:
        assert (tmp_path / f"d{part}").read_bytes() == (tmp_path / f"whole{part}").read_bytes()
    (folder / "dataset.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dataset\.bin has 0 bytes, but 8 were written"):
        StagedDataset(folder, prefix=tmp_path / "d", vocab_size=300, position=position)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_and_truncated_files_name_file_and_sizes(tmp_path: Path, suffix: str) -> None:
    write_dataset(tmp_path / "d", DOCUMENTS)
    path = tmp_path / f"d.{suffix}"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"d\.{suffix} has {size - 3} bytes.*says {size}.*again"):
        IndexedDataset(tmp_path / "d")
    path.unlink()
    with pytest.raises(ValueError, match=rf"d\.{suffix}: no such file"):
        IndexedDataset(tmp_path / "d")


def test_altered_bytes_are_found(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", DOCUMENTS)
    verify_digests(dataset)
    for suffix, message in ((".bin", r"d\.bin has digest"), (".idx", r"d\.idx has another")):
        path = tmp_path / f"d{suffix}"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ValueError, match=message):
            verify_digests(dataset)
        path.write_bytes(good)


def test_an_index_that_points_out_of_the_data_is_not_followed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.idx"
    content = bytearray(path.read_bytes())
    content[34 + 3 * 4 + 8 : 34 + 3 * 4 + 16] = (10**9).to_bytes(8, "little")  # second pointer
    path.write_bytes(content)
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.document(0).tolist() == DOCUMENTS[0]
    with pytest.raises(ValueError, match=r"document 1 lies at bytes 1000000000\.\."):
        dataset.document(1)


def test_manifest_of_another_schema_or_with_unknown_keys_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.manifest.json"
    good = json.loads(path.read_text())
    for change in ({"schema_version": 1}, {"extra": 1}, {"tokens": "65"}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .*schema 2"):
            IndexedDataset(tmp_path / "d")
    path.write_text(json.dumps(good | {"tokens": 66}))
    with pytest.raises(ValueError, match="66 tokens"):
        IndexedDataset(tmp_path / "d")
    path.unlink()
    with pytest.raises(ValueError, match=r"d\.manifest\.json cannot be read"):
        IndexedDataset(tmp_path / "d")
    with pytest.raises(ValueError, match=r"another tokenizer \(sha256 abab.*than t\.model"):
        dataset.check_tokenizer("cd" * 32, path=Path("t.model"))


def test_data_digest_names_the_content_and_not_the_place(tmp_path: Path) -> None:
    first, moved = (
        write_dataset(tmp_path / "a", DOCUMENTS),
        write_dataset(tmp_path / "b", DOCUMENTS),
    )
    joined = write_dataset(tmp_path / "c", [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]])
    assert first.data_digest == moved.data_digest != joined.data_digest
    assert len(first.data_digest) == 16
