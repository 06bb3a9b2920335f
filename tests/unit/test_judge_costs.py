"""What the cache's answers cost, and tools/judge_cache.py, which shows it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.judge.cache import Cache, Paid
from megatron_sip.judge.costs import cost_report, text

TOOL = Path(__file__).parents[2] / "tools" / "judge_cache.py"


def paid(**changes: Any) -> Paid:
    fields = {
        "kind": "pairwise", "criterion": "coherence", "prompt": "coherence 1", "model": "big",
        "vote": 0, "prompt_tokens": 1000, "completion_tokens": 2, "seconds": 1.0, "run": "a",
    }  # fmt: skip
    return Paid(**(fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache = Cache(tmp_path)
    for i in range(1, 101):
        cache.put(f"{i}", 0.5, paid(seconds=float(i)))
    cache.put("r", "text", paid(kind="rewrite", criterion="", model="small", seconds=3.0))
    cache.put("b", 0.5, paid(run="b", prompt_tokens=7))
    cache.put("unknown", 0.5)
    cache.close()
    return tmp_path


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    spec = importlib.util.spec_from_file_location("judge_cache_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["judge_cache.py", *map(str, arguments)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


def test_costs_are_summed_by_run_criterion_prompt_and_model(folder: Path) -> None:
    rows = cost_report(folder, prices={"big": (0.5, 100.0)})
    names = [(r.run, r.criterion, r.prompt, r.model) for r in rows]
    assert names == [
        ("", "", "", ""),
        ("a", "coherence", "coherence 1", "big"),
        ("a", "rewrite", "coherence 1", "small"),
        ("b", "coherence", "coherence 1", "big"),
    ]
    row = rows[1]
    assert (row.questions, row.prompt_tokens, row.completion_tokens) == (100, 100_000, 200)
    assert (row.latency_sum_s, row.latency_median_s) == (5050.0, 50.5)
    assert row.latency_p95_s == pytest.approx(95.05)
    assert row.money == pytest.approx((100_000 * 0.5 + 200 * 100) / 1e6)
    assert [r.money for r in rows[:3:2]] == [None, None]
    assert [r.run for r in cost_report(folder, "b")] == ["b"]


def test_a_row_that_stands_in_two_files_counts_once_and_a_second_payment_twice(
    folder: Path,
) -> None:
    (path,) = folder.glob("*.sqlite")
    (folder / "copy.sqlite").write_bytes(path.read_bytes())
    before = cost_report(folder)
    assert before[1].questions == 100
    cache = Cache(folder)
    cache.put("1", 0.5, paid())
    cache.close()
    assert cost_report(folder)[1].questions == 101


def test_the_table_has_a_line_of_sums_and_shows_names_inert(folder: Path) -> None:
    cache = Cache(folder)
    cache.put("x", 1, paid(run="c", model="\x1b[31m"))
    cache.close()
    lines = text(cost_report(folder)).splitlines()
    assert lines[0].split()[:4] == ["run", "criterion", "prompt", "model"]
    assert "\x1b" not in "".join(lines) and r"\x1b[31m" in lines[-2]
    assert lines[-1].split() == ["in", "all", "104", "102,007", "206", "5,055.000"]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_the_tool_reports_merges_and_verifies(folder: Path, tool: Any) -> None:
    code, out, _ = tool("report", folder, "--run", "a", "--price", "small=1000,0")
    assert code == 0 and out.splitlines()[2].endswith("1.000") and "money" in out
    Cache(folder).close()
    cache = Cache(folder)
    cache.put("own", 0.625)
    cache.close()
    code, out, _ = tool("verify", folder)
    assert code == 0 and out.endswith("2 files, 104 rows, 0 damaged files\n")
    code, out, _ = tool("merge", folder)
    assert code == 0 and "104 rows of 2 files" in out
    assert "nothing to merge" in tool("merge", folder)[1]
    (path,) = folder.glob("*.sqlite")
    path.write_bytes(path.read_bytes().replace(b"0.625", b"0.626"))
    code, out, _ = tool("verify", folder)
    assert code == 1 and "103 rows, 1 damaged, schema version 2" in out


def test_the_tool_tells_errors_on_stderr(folder: Path, tool: Any) -> None:
    for arguments, message in (
        (("report", folder / "none"), "is no folder; give the recipe's judge.cache_dir"),
        (("report", folder, "--price", "big=1"), "--price is big=1; it must be MODEL="),
        (("report", folder, "--price", "huge=1,2"), "prices name huge, but the models are "),
        (("merge", folder / "none"), "is no folder"),
    ):
        code, out, err = tool(*arguments)
        assert (code, out) == (1, "") and err.startswith("error: ") and message in err


@pytest.mark.parametrize("command", ["report", "merge", "verify"])
def test_each_command_teaches_with_an_example(
    tool: Any, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool(command, "--help")
    assert stopped.value.code == 0
    out = capfd.readouterr().out
    assert "example: " in out and f"python tools/judge_cache.py {command} " in out
