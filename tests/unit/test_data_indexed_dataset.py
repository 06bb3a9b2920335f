"""Indexed datasets: Megatron's own bytes, exact reading, errors for damaged files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.indexed_dataset_writer import IndexedDatasetWriter

DOCUMENTS = [[5, 6, 7, 1], [8, 1], [*range(2, 60), 1]]
FACTS = {
    "split": "",
    "split_shares": "",
    "split_salt": "",
    "tokenizer_digest": "ab" * 32,
    "eod": 1,
    "append_eod": True,
    "bad_records": 0,
    "sources": (),
}


def write(prefix: Path, documents: list[list[int]], *, vocab_size: int = 300) -> IndexedDataset:
    writer = IndexedDatasetWriter(prefix, vocab_size=vocab_size)
    for document in documents:
        writer.add(document)
    writer.stage(**FACTS)
    writer.publish()
    return IndexedDataset(prefix)


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
    ours = write(tmp_path / "ours", DOCUMENTS, vocab_size=vocab_size)
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert (tmp_path / f"ours.{suffix}").read_bytes() == theirs
    assert ours.manifest.dtype == dtype


def test_documents_and_lengths_are_read_back(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d.v1", DOCUMENTS)
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
    assert pickle.loads(pickle.dumps(dataset)).document(2).tolist() == DOCUMENTS[2]


def test_nothing_has_its_final_name_before_publish_and_nothing_stays_after_discard(
    tmp_path: Path,
) -> None:
    writer = IndexedDatasetWriter(tmp_path / "d", vocab_size=300)
    writer.add([3, 1])
    writer.stage(**FACTS)
    assert list(tmp_path.glob("d*")) == []
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_publishing_replaces_an_older_dataset(tmp_path: Path) -> None:
    old = write(tmp_path / "d", DOCUMENTS)
    new = write(tmp_path / "d", [[9, 9, 1]])
    assert new.document(0).tolist() == [9, 9, 1]
    assert old.document(0).tolist() == DOCUMENTS[0]  # an open reader keeps the old files
    assert len(list(tmp_path.iterdir())) == 3


def test_writer_refuses_empty_documents_foreign_ids_and_empty_datasets(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "d", vocab_size=300)
    for wrong in ([], [300], [-1]):
        with pytest.raises(ValueError, match=r"all in \[0, 300\)"):
            writer.add(wrong)
    with pytest.raises(ValueError, match="no document"):
        writer.stage(**FACTS)
    writer.discard()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_and_truncated_files_name_file_and_sizes(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "d", DOCUMENTS)
    path = tmp_path / f"d.{suffix}"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"d\.{suffix} has {size - 3} bytes.*says {size}.*again"):
        IndexedDataset(tmp_path / "d")
    path.unlink()
    with pytest.raises(ValueError, match=rf"d\.{suffix}: no such file"):
        IndexedDataset(tmp_path / "d")


def test_altered_bytes_are_found(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", DOCUMENTS)
    dataset.verify()
    for suffix in (".bin", ".idx"):
        path = tmp_path / f"d{suffix}"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"d\.bin has digest"):
        dataset.verify()
    with pytest.raises(ValueError, match=r"d\.idx has another digest"):
        IndexedDataset(tmp_path / "d")


def test_manifest_of_another_schema_or_with_unknown_keys_is_refused(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.manifest.json"
    good = json.loads(path.read_text())
    for change in ({"schema_version": 2}, {"extra": 1}, {"tokens": "65"}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .*schema 1"):
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
    first, moved = write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", DOCUMENTS)
    joined = write(tmp_path / "c", [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]])
    assert first.data_digest == moved.data_digest != joined.data_digest
    assert len(first.data_digest) == 16
