"""Preprocessing: splits, bad records, all or nothing, the command line tools."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.manifest import PARTS, Manifest
from megatron_sip.data.preprocess import pipeline
from megatron_sip.data.splits import parse_split, split_of
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [f"Speech number {i} on the state of the union.\nThank you.\n" for i in range(60)]
SPLIT = parse_split("train=60,validation=20,test=20")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preprocess") / "t.model"
    train_tokenizer(iter(TEXTS), vocab_size=320, output=path)
    return path


def preprocess(inputs: list[str], **settings: Any) -> dict[str, Manifest]:
    return pipeline.preprocess(inputs, pipeline.Settings(**settings))


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def read_texts(prefix: Path, model: Path) -> Iterator[str]:
    tokenizer, dataset = Tokenizer.load(model), IndexedDataset(prefix)
    for i in range(dataset.num_documents):
        ids = dataset.document(i).tolist()
        assert ids.count(tokenizer.eod) == 1 and ids[-1] == tokenizer.eod
        yield tokenizer.decode(ids)


def test_texts_come_back_from_jsonl_and_txt_in_file_order(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:3])
    (tmp_path / "a.txt").write_bytes(b"one\r\ndocument a file\n\n")
    (tmp_path / "c.jsonl").write_text('{"a": {"b.x": 1, "text": "x"}, "text": "deep"}\n\n')
    patterns = [str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "a.*")]
    manifests = preprocess(patterns, tokenizer=model, output_prefix=tmp_path / "out" / "d")
    expected = ["one\r\ndocument a file\n\n", *TEXTS[:3], "deep"]
    assert list(read_texts(tmp_path / "out" / "d", model)) == expected
    assert manifests[""].documents == 5
    assert [Path(s.path).name for s in manifests[""].sources] == ["a.txt", "b.jsonl", "c.jsonl"]
    preprocess(
        [str(tmp_path / "c.jsonl")],
        tokenizer=model,
        output_prefix=tmp_path / "e",
        text_key="a.text",
    )
    assert list(read_texts(tmp_path / "e", model)) == ["x"]


def test_without_append_eod_no_document_ends_with_it(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    preprocess([source], tokenizer=model, output_prefix=tmp_path / "d", append_eod=False)
    dataset, tokenizer = IndexedDataset(tmp_path / "d"), Tokenizer.load(model)
    assert dataset.document(0).tolist() == tokenizer.encode(TEXTS[0])
    assert dataset.manifest.append_eod is False


def test_splits_are_disjoint_whole_and_stable_when_documents_are_added_or_reordered(
    tmp_path: Path, model: Path
) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", TEXTS[:40])
    more = write_jsonl(tmp_path / "more.jsonl", [*reversed(TEXTS), TEXTS[0]])
    preprocess([few], tokenizer=model, output_prefix=tmp_path / "few", split=SPLIT)
    preprocess([more], tokenizer=model, output_prefix=tmp_path / "more", split=SPLIT)
    before, after = (
        {n: list(read_texts(tmp_path / f"{p}_{n}", model)) for n in SPLIT.names}
        for p in ("few", "more")
    )
    assert sorted(t for texts in before.values() for t in texts) == sorted(TEXTS[:40])
    for name in SPLIT.names:
        assert set(before[name]) <= set(after[name])
        for other in set(SPLIT.names) - {name}:
            assert not set(after[name]) & set(after[other])
    manifest = IndexedDataset(tmp_path / "more_test").manifest
    assert (manifest.split, manifest.split_shares) == ("test", str(SPLIT))


def test_split_shares_and_salt_decide() -> None:
    names = [split_of(f"text {i}", SPLIT) for i in range(3000)]
    assert abs(names.count("train") / 3000 - 0.6) < 0.04  # 4 standard errors
    assert abs(names.count("test") / 3000 - 0.2) < 0.03
    salted = parse_split(str(SPLIT), salt="other")
    assert [split_of(f"text {i}", salted) for i in range(3000)] != names
    assert [split_of(t, SPLIT) for t in "abcd"] == ["validation", "train", "test", "test"]


@pytest.mark.parametrize("text", ["train", "train=0", "train=1,train=2", "a/b=1", "", "train=1.5"])
def test_malformed_splits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        parse_split(text)


BAD_LINES = {
    "{": "not valid JSON",
    "[" * 100_000: "not valid JSON",
    '{"txt": "a"}': "no key 'text'",
    "3": "no key 'text'",
    '{"text": 3}': "text is int",
    '{"text": ""}': "text is empty",
    '{"text": "\\ud800"}': "not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.values())
def test_a_bad_record_is_an_error_with_file_and_line_and_nothing_is_published(
    tmp_path: Path, model: Path, line: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + f"\n\n{line}\n")
    out = tmp_path / "out" / "d"
    with pytest.raises(ValueError, match=rf"(?s)-records 0.*a\.jsonl:3: {BAD_LINES[line]}"):
        preprocess([str(path)], tokenizer=model, output_prefix=out)
    assert list(out.parent.iterdir()) == []
    manifests = preprocess([str(path)], tokenizer=model, output_prefix=out, max_bad_records=1)
    assert (manifests[""].documents, manifests[""].bad_records) == (1, 1)


def test_a_failed_run_leaves_an_older_dataset_as_it_is(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out" / "d"
    preprocess([source], tokenizer=model, output_prefix=out, split=SPLIT)
    before = {p.name: p.read_bytes() for p in out.parent.iterdir()}
    assert len(before) == 3 * len(PARTS)
    bad = tmp_path / "z.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"z\.txt:1: .*UTF-8"):
        preprocess([source, str(bad)], tokenizer=model, output_prefix=out, split=SPLIT)
    assert {p.name: p.read_bytes() for p in out.parent.iterdir()} == before


def test_empty_splits_missing_inputs_and_unknown_suffixes_are_errors(
    tmp_path: Path, model: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:1])
    (tmp_path / "a.csv").write_text("x")
    out = tmp_path / "out" / "d"
    with pytest.raises(ValueError, match="has no document"):
        preprocess([source], tokenizer=model, output_prefix=out, split=SPLIT)
    assert list(out.parent.iterdir()) == []
    with pytest.raises(ValueError, match="matches no file"):
        preprocess([str(tmp_path / "none*")], tokenizer=model, output_prefix=out)
    with pytest.raises(ValueError, match=r"a\.csv: the name must end in"):
        preprocess([str(tmp_path / "a.csv")], tokenizer=model, output_prefix=out)


def run_tool(name: str, *args: object) -> int:
    """Exit status of a tool, run in this process to save its imports."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def test_tools_train_and_preprocess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    model = tmp_path / "t.model"
    inputs = ("--input", source, "--vocab-size", 320, "--output", model)
    assert run_tool("train_tokenizer.py", *inputs, "--split", SPLIT, "--only", "train") == 0
    train = [t for t in TEXTS if split_of(t, SPLIT) == "train"]
    direct = train_tokenizer(iter(train), vocab_size=320, output=tmp_path / "direct.model")
    assert Tokenizer.load(model).digest == direct.digest
    out = ("--tokenizer", model, "--output-prefix", tmp_path / "d")
    assert run_tool("preprocess_data.py", "--input", source, *out, "--split", SPLIT) == 0
    assert f"{tmp_path / 'd'}_train: {len(train)} documents" in capsys.readouterr().out
    assert list(read_texts(tmp_path / "d_train", model)) == train


def test_tools_report_an_error_on_stderr_and_exit_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--tokenizer", tmp_path / "t.model", "--output-prefix", tmp_path / "d")
    assert run_tool("preprocess_data.py", "--input", "x", *out) == 1
    assert capsys.readouterr().err.startswith("error: --input 'x' matches no file")
    inputs = ("--input", "x", "--vocab-size", 320, "--output", tmp_path / "t.model")
    assert run_tool("train_tokenizer.py", *inputs, "--only", "train") == 1
    assert "--split and --only belong together" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_both_tools_have_the_options_that_their_errors_name(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "long " * 300_000}) + "\n")
    (folder / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    for name, *arguments in (
        ("train_tokenizer.py", "--vocab-size", 300, "--output", tmp_path / "t.model"),
        ("preprocess_data.py", "--tokenizer", model, "--output-prefix", tmp_path / "d"),
    ):
        given = (name, "--input", folder, *arguments)
        assert run_tool(*given) == 1
        assert "give --follow-links if" in capsys.readouterr().err
        assert run_tool(*given, "--follow-links", "--max-record-mb", 1) == 1
        assert "are more than --max-record-mb allows (1048576)" in capsys.readouterr().err
        assert run_tool(*given, "--follow-links", "--max-record-mb", 0) == 1
        assert "must be at least 1" in capsys.readouterr().err
        assert run_tool(*given, "--follow-links", "--max-record-mb", 2) == 0
