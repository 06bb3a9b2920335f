"""Which files paths, folders, globs and links name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from preprocess_helpers import (
    assert_refused,
    byte_level_bpe,
    hugging_face,
    lines,
    preprocess_here,
    read_texts,
    write_arrow,
)

from megatron_sip.data.preprocess.inputs import expand_inputs


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def test_a_dataset_dict_and_a_selection_of_rows_are_refused(tmp_path: Path, bpe: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "both" / split).mkdir(parents=True)
        hugging_face(tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="several splits"):
        expand_inputs([str(tmp_path / "both")])
    assert len(expand_inputs([str(tmp_path / "both" / "train")])) == 2
    (tmp_path / "rows").mkdir()
    selection = [{"filename": "indices.arrow"}]
    hugging_face(tmp_path / "rows", _indices_data_files=selection)
    with pytest.raises(ValueError, match="flatten_indices"):
        expand_inputs([str(tmp_path / "rows")])
    hugging_face(tmp_path / "rows", _indices_data_files=None)
    assert len(expand_inputs([str(tmp_path / "rows")])) == 2


def test_only_the_files_that_a_dataset_lists_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hugging_face(tmp_path)
    write_arrow(tmp_path / "cache-0123.arrow", pa.table({"text": ["made by map()"]}))
    names = [Path(file.url).name for file in expand_inputs([str(tmp_path)])]
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert "left out 1 .arrow files" in caplog.text
    (tmp_path / "state.json").write_text('{"another": "program"}')
    assert len(expand_inputs([str(tmp_path)])) == 3
    hugging_face(tmp_path)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"without its .*data-00001-of-00002\.arrow"):
        expand_inputs([str(tmp_path)])


def test_names_that_look_like_patterns_or_urls_are_names(tmp_path: Path, bpe: Path) -> None:
    names = ["a::b", "a[1]", "a*b", "a b%20", "a#b?c", "{x}", "\u00e4"]
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    for name in names:
        path = tmp_path / f"{name}.jsonl"
        assert [file.url for file in expand_inputs([str(path)])] == [str(path)]
    preprocess_here([tmp_path], tmp_path / "d", tokenizer=bpe)
    assert read_texts(tmp_path / "d", bpe) == sorted(names)


def test_globs_folders_and_files_name_each_file_once_in_the_order_of_the_names(
    tmp_path: Path,
) -> None:
    for name in ("b/c/2.jsonl.gz", "a/9.txt", "b/1.jsonl", "b/3.md", "10.ndjson"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(*patterns: str) -> list[str]:
        files = expand_inputs([str(tmp_path / pattern) for pattern in patterns])
        return [str(Path(file.url).relative_to(tmp_path)) for file in files]

    every = ["10.ndjson", "a/9.txt", "b/1.jsonl", "b/c/2.jsonl.gz"]
    assert found(".") == found("b", "*.ndjson", "a/9.txt", "b/1.jsonl", "a") == every
    assert found("**/*.jsonl*") == every[2:]
    assert found("b/*.jsonl", "?/9.txt") == every[1:3]
    with pytest.raises(ValueError, match=r"3\.md: the name must end in"):
        found("b/*")


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
