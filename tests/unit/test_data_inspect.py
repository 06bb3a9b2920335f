"""What inspect tells of a dataset, and that its view shows hostile text inert."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from maintenance_helpers import (
    CORPUS,
    EOD,
    TOKENIZER,
    PlainTokenizer,
    altered_rows,
    build,
    names,
    other_tokenizer,
    part,
    small_pieces,
    with_value,
)
from rich.console import Console

from megatron_sip.data.maintenance import inspect_view
from megatron_sip.data.maintenance.inspect import inspect
from megatron_sip.data.manifest import PARTS, Source


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
