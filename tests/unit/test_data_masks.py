"""Masks made by steps: what each left out, reports that are true, wrong arguments."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from selection_helpers import QUESTION, SPEECHES, domain_rules

from megatron_sip.data.document_mask import load_mask
from megatron_sip.data.provenance import batch_of
from megatron_sip.data.selection import documents
from megatron_sip.data.selection.combine import report_path, write_mask
from megatron_sip.data.selection.contamination import Contamination, read_evaluation
from megatron_sip.data.selection.near_duplicates import NearDuplicates
from megatron_sip.data.selection.steps import Batch, Objection
from megatron_sip.data.selection.text_rules import TextRules, TextRulesStep
from megatron_sip.data.staged_dataset import StagedDataset
from megatron_sip.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json whose tokens are bytes."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


def make_dataset(
    prefix: Path,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    urls: Sequence[str | None] | None = None,
    min_tokens: int = 1,
) -> Path:
    kept = ("url",) if urls is not None else ()
    staged = StagedDataset(
        prefix.with_name("partial"), prefix=prefix, vocab_size=tokenizer.vocab_size, kept=kept
    )
    rows = [np.array([*tokenizer.encode(text), tokenizer.eod], staged.dtype) for text in texts]
    zeros = np.zeros(len(texts), np.int64)
    columns: list[Any] = [zeros, zeros, np.array([len(row) for row in rows]), zeros, zeros]
    columns += [list(urls)] if urls is not None else []
    staged.append(np.concatenate(rows).tobytes(), batch_of(columns, kept))
    staged.stage(
        min_tokens=min_tokens, append_eod=True, made_by="preprocess", split="", split_shares="",
        split_salt="", tokenizer_digest=tokenizer.digest, eod=tokenizer.eod, bad_records=0,
        sources=(),
    )  # fmt: skip
    staged.publish()
    staged.close()
    return prefix


def all_steps(folder: Path) -> list[Any]:
    (folder / "e.txt").write_text(QUESTION)
    return [
        TextRulesStep(TextRules(min_words=10, max_words=590)),
        NearDuplicates(seed=3),
        Contamination([read_evaluation(folder / "e.txt", text_key="text")]),
    ]


def test_a_mask_holds_what_every_step_left_and_the_report_says_why(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    base = [speech[:1500] for speech in SPEECHES[:6]]
    texts = [
        base[0], "too short", base[1], base[0] + " more", f"{base[2]} {QUESTION}", "x",
        "word " * 600, base[3], base[2],
    ]  # fmt: skip
    prefix = make_dataset(tmp_path / "d.v1", texts, tokenizer, min_tokens=2)
    seen: list[tuple[int, int]] = []
    report = write_mask(
        prefix, name="clean-1", steps=all_steps(tmp_path), tokenizer=tokenizer,
        tokenizer_path=tokenizer_path, progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    # the leak at 4 leaves last, when its copy at 8 has left for resembling it
    mask = load_mask(tmp_path / "d.v1.clean-1")
    assert np.flatnonzero(mask.members()).tolist() == [0, 2, 7]
    assert seen == [(9, 9)]
    eligible = load_mask(tmp_path / "d.v1.eligible").header
    assert (mask.header.min_tokens, mask.header.idx_xxh3_128) == (2, eligible.idx_xxh3_128)
    rule = json.loads(mask.header.rule)
    assert rule["base"] == {"mask": "eligible", "payload_xxh3_128": eligible.payload_xxh3_128}
    assert [step["step"] for step in rule["steps"]] == [
        "text_rules", "near_duplicates", "contamination",
    ]  # fmt: skip
    assert rule["steps"][0] == {"step": "text_rules", "min_words": 10, "max_words": 590}
    assert (report.documents, report.base_selected, report.selected) == (9, 8, 3)
    counts = [(step.seen, step.left_out, step.by_rule) for step in report.steps]
    leak = str(tmp_path / "e.txt")
    assert counts == [
        (8, 2, {"max_words": 1, "min_words": 1}), (6, 2, {"near_duplicate": 2}), (4, 1, {leak: 1}),
    ]  # fmt: skip
    short = report.steps[0].examples["min_words"][0]
    assert (short.document, short.detail, short.excerpt) == (1, "words 2", "too short")
    assert report.steps[0].examples["max_words"][0].excerpt == ("word " * 32).strip() + " ..."
    assert report.steps[2].examples[leak][0].document == 4
    written = json.loads(report_path(prefix, "clean-1").read_bytes())
    assert written == json.loads(report.model_dump_json())
    assert written["payload_xxh3_128"] == mask.header.payload_xxh3_128


def test_the_same_seed_gives_the_same_bytes_however_the_documents_are_batched(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [speech[:900] for speech in SPEECHES] + [SPEECHES[3][:890], QUESTION]
    prefix = make_dataset(tmp_path / "d", texts, tokenizer)
    files = []
    for batch in (1024, 3, 1):
        monkeypatch.setattr(documents, "_BATCH_DOCUMENTS", batch)
        write_mask(
            prefix, name="m", steps=all_steps(tmp_path), tokenizer=tokenizer,
            tokenizer_path=tokenizer_path,
        )  # fmt: skip
        paths = (tmp_path / "d.m", report_path(prefix, "m"))
        files.append([path.read_bytes() for path in paths])
        for path in paths:
            path.unlink()
    assert load_mask(tmp_path / "d.eligible").num_selected == len(texts)
    assert files[0] == files[1] == files[2]


def test_a_mask_can_be_the_base_of_another_and_urls_come_from_the_provenance(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_BATCH_DOCUMENTS", 2)
    urls = ["http://bad.example", "http://good.example", None, "sub.bad.example/x", "bad.example"]
    texts = ["a b c", "a b c", "a b c", "a b c", "a b"]
    prefix = make_dataset(tmp_path / "d", texts, tokenizer, urls=urls)
    common = {"tokenizer": tokenizer, "tokenizer_path": tokenizer_path}
    three = [TextRulesStep(TextRules(min_words=3))]
    write_mask(prefix, name="three", steps=three, **common)
    bad = [TextRulesStep(domain_rules(tmp_path, listed=True))]
    report = write_mask(prefix, name="bad", base="three", steps=bad, **common)
    mask = load_mask(tmp_path / "d.bad")
    assert np.flatnonzero(mask.members()).tolist() == [0, 3]
    rule = json.loads(mask.header.rule)
    assert rule["base"]["rule"]["steps"] == [{"step": "text_rules", "min_words": 3}]
    digest = hashlib.sha256((tmp_path / "domains").read_bytes()).hexdigest()
    assert rule["steps"][0]["domains_sha256"] == digest
    assert report.steps[0].facts == {"without_url": 1}
    assert report.steps[0].examples["domain_listed"][0].detail == "url http://good.example"


class Judge:
    """A step from outside, as a judge would be."""

    name = "judge"
    columns = ()

    def __init__(self) -> None:
        self.seen: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"model": "m"}

    def objections(self, batch: Batch) -> list[tuple[Objection, ...]]:
        self.seen += batch.texts
        return [(Objection("bad", t),) if "bad" in t else () for t in batch.texts]

    def facts(self) -> dict[str, Any]:
        return {"asked": len(self.seen)}


def test_any_step_can_be_added_and_sees_only_what_earlier_steps_left(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    prefix = make_dataset(tmp_path / "d", ["short", "a bad text", "a good text"], tokenizer)
    judge = Judge()
    steps = [TextRulesStep(TextRules(min_words=3)), judge]
    report = write_mask(
        prefix, name="m", steps=steps, tokenizer=tokenizer, tokenizer_path=tokenizer_path
    )
    assert judge.seen == ["a bad text", "a good text"]
    assert np.flatnonzero(load_mask(tmp_path / "d.m").members()).tolist() == [2]
    assert report.steps[1].facts == {"asked": 2} and report.steps[1].settings == {"model": "m"}


def test_the_report_shows_the_first_five_documents_of_a_rule(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    prefix = make_dataset(tmp_path / "d", ["a b"] * 7 + ["a b c"], tokenizer)
    report = write_mask(
        prefix, name="m", steps=[TextRulesStep(TextRules(min_words=3))], tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
    )  # fmt: skip
    assert report.steps[0].by_rule == {"min_words": 7}
    assert [e.document for e in report.steps[0].examples["min_words"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Clean"}, "mask 'Clean': a name is a lower-case letter"),
        ({"name": "a/b"}, "mask 'a/b'"), ({"name": "a.b"}, "mask 'a.b'"),
        ({"name": "eligible"}, "none of bin, idx, manifest, documents, eligible"),
        ({"name": "idx"}, "mask 'idx'"),
        ({"base": "../m"}, "base '../m' is no name"), ({"base": "m"}, "cannot be its own base"),
        ({"base": "absent"}, "d.absent cannot be read"),
        ({"base": "foreign"}, "make the mask again"),
        ({"steps": []}, "no step is given"),
        ({"prefix": "s3://bucket/d"}, "is in an object store"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_and_leave_no_file(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path, arguments: Any, message: str
) -> None:
    make_dataset(tmp_path / "other", ["some text", "more"], tokenizer)
    prefix = make_dataset(tmp_path / "d", ["a text", "more"], tokenizer)
    (tmp_path / "d.foreign").write_bytes((tmp_path / "other.eligible").read_bytes())
    before = sorted(tmp_path.iterdir())
    given = {"prefix": prefix, "name": "m", "steps": [TextRulesStep(TextRules(min_words=1))]}
    given |= {"tokenizer": tokenizer, "tokenizer_path": tokenizer_path, **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        write_mask(given.pop("prefix"), **given)
    assert sorted(tmp_path.iterdir()) == before


def test_another_tokenizer_and_a_missing_column_are_told(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    prefix = make_dataset(tmp_path / "d", ["a text"], tokenizer)
    other = tmp_path / "tokenizer.json"
    other.write_bytes(tokenizer_path.read_bytes() + b"\n")
    step = TextRulesStep(TextRules(min_words=1))
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        write_mask(
            prefix, name="m", steps=[step], tokenizer=Tokenizer.load(other), tokenizer_path=other
        )
    step = TextRulesStep(domain_rules(tmp_path, listed=False))
    with pytest.raises(ValueError, match="has no column 'url'"):
        write_mask(
            prefix, name="m", steps=[step], tokenizer=tokenizer, tokenizer_path=tokenizer_path
        )
    longer = make_dataset(tmp_path / "e", ["a text", "b"], tokenizer, urls=["x.org", "y.org"])
    make_dataset(tmp_path / "f", ["a text"], tokenizer, urls=["x.org"])
    (tmp_path / "f.documents.parquet").replace(tmp_path / "e.documents.parquet")
    with pytest.raises(ValueError, match="has 1 rows, but the dataset 2 documents"):
        write_mask(
            longer, name="m", steps=[step], tokenizer=tokenizer, tokenizer_path=tokenizer_path
        )


def test_settings_too_long_for_a_header_are_told_before_the_pass(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    prefix = make_dataset(tmp_path / "d", ["a text"], tokenizer)
    judge = Judge()
    judge.describe = lambda: {"prompt": "x" * (1 << 19)}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"settings take .* bytes, but a mask's header holds"):
        write_mask(
            prefix, name="m", steps=[judge], tokenizer=tokenizer, tokenizer_path=tokenizer_path
        )
    assert judge.seen == []
