"""Every wrong input is refused before anything starts, in words that name key, value and remedy.

The table of docs/errors.md is what the runs said. To write it anew:
MEGATRON_SIP_WRITE_DOCS=1 python -m pytest tests/integration/test_wrong_inputs.py
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import ROOT
from wrong_inputs import CASES, FILES, RECIPES, SIZES, Case, write_recipe

DOCS = ROOT / "docs" / "errors.md"
QUICK_S, LIMIT_S = 5, 60
AVAILABLE = re.compile(r"[\d,.]+ [KMGT]iB are (available|free)")
HOLDER = re.compile(r"process \d+ on \S+")
ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@dataclass(frozen=True)
class Refusal:
    """How one run ended."""

    status: int
    seconds: float
    said: str
    new_files: frozenset[Path]


def refuse(folder: Path, case: Case) -> Refusal:
    """Run the case and see what it leaves."""
    write_recipe(folder, case)
    if case.prepare is not None:
        case.prepare(folder)
    before = frozenset(folder.rglob("*"))
    arguments = ["--config", case.recipe, *case.arguments]
    arguments += [part for override in case.overrides for part in ("--set", override)]
    environment = os.environ | ENVIRONMENT | dict(case.environment)
    environment = {k: v for k, v in environment.items() if v and k != "JUDGE_API_KEY"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", str(ROOT))
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_sip.py"), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    return Refusal(done.returncode, seconds, done.stderr, frozenset(folder.rglob("*")) - before)


@pytest.fixture(scope="module")
def refusals(workplace) -> dict[str, Refusal]:
    """By case, one after another: they share a folder."""
    assert workplace.judge == workplace.folder / "judge"
    return {case.what: refuse(workplace.folder, case) for case in CASES}


def message(refusal: Refusal) -> str:
    """What was said, without numbers that differ between machines."""
    said = AVAILABLE.sub(r"... \1", refusal.said.removeprefix("error: ").strip())
    return HOLDER.sub("process ... on ...", said)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_it_is_refused_in_one_error_and_nothing_is_written(refusals, case: Case) -> None:
    refusal = refusals[case.what]
    assert refusal.status == 1 and not refusal.new_files
    assert refusal.said.startswith("error: ") and "Traceback" not in refusal.said
    assert len(message(refusal)) > 40
    if case.quick:
        assert refusal.seconds < QUICK_S


def test_no_two_wrong_inputs_get_the_same_message(refusals) -> None:
    said = [message(refusal) for refusal in refusals.values()]
    assert len(set(said)) == len(said) == len(CASES) >= 25


def test_several_mistakes_are_told_at_once(refusals) -> None:
    said = message(refusals["several at once"])
    assert said.startswith("3 things are wrong, nothing was started:")
    assert all(key in said for key in ("run.dir judge", "data.train", "servers.judge.model"))


def test_torchrun_says_an_error_once_for_all_ranks_of_a_node(workplace, launch) -> None:
    from tiny_run import NTP

    run = launch(workplace.recipe(NTP, "spelt"), "--set", "optimizer.learning_rate=1").wait(60)
    assert run.process.returncode != 0 and not run.run_dir.exists()
    assert run.errors() == [f"error: {run.run_dir}.toml:"]


def table(refusals: dict[str, Refusal]) -> str:
    """docs/errors.md between its two marks."""
    parts = []
    for title, cases in (("Recipe", RECIPES), ("Files, folders, ranks", FILES), ("Sizes", SIZES)):
        parts += [f"## {title}", "", "| what is wrong | what is said |", "|---|---|"]
        for case in cases:
            said = html.escape(message(refusals[case.what]), quote=False)
            lines = [line.strip().replace("|", "&#124;") for line in said.splitlines()]
            parts.append(f"| {case.what} | {'<br>'.join(lines)} |")
        parts.append("")
    return "\n".join(parts)


def test_docs_show_what_is_said(refusals) -> None:
    begin, end = "<!-- messages -->\n", "<!-- end of messages -->"
    head, rest = DOCS.read_text().split(begin)
    shown, tail = rest.split(end)
    if os.environ.get("MEGATRON_SIP_WRITE_DOCS"):
        DOCS.write_text(head + begin + table(refusals) + end + tail)
    else:
        assert shown == table(refusals), "see the top of this file for how to write it anew"
