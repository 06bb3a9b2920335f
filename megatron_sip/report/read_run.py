"""Read a run folder for the report. What is missing or damaged becomes a sentence, not a failure.

Files are read as plain data and not through the config models, so that runs of earlier releases
can be shown too.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.report.ledger import Ledger, read_ledger

MARKS_OF_A_RUN = ("config.toml", "metrics.jsonl", "summary.json")


@dataclass(frozen=True)
class RunData:
    """All that the page knows about one run."""

    name: str
    settings: dict[str, Any]  # config.toml; empty if unreadable
    environment: dict[str, Any]  # environment.json; empty if unreadable
    summary: dict[str, Any] | None  # summary.json; None: the run has not finished
    steps: np.ndarray  # int64[T], ascending
    metrics: dict[str, np.ndarray]  # name -> float64[T]; NaN where a step lacks it
    ledger: Ledger
    problems: tuple[str, ...]  # for the reader of the page

    @property
    def task(self) -> str:
        """ "sip", "ntp", or "" where no file tells."""
        found = section(self.summary or {}, "task") or section(self.settings, "run", "task")
        return found if isinstance(found, str) else ""

    @property
    def evaluation(self) -> dict[str, Any]:
        """`eval` of summary.json; empty without one."""
        found = section(self.summary or {}, "eval")
        return found if isinstance(found, dict) else {}


def section(tree: dict[str, Any], *keys: str) -> Any:
    """tree[key][key]..., None where a key or a table is absent."""
    found: Any = tree
    for key in keys:
        if not isinstance(found, dict):
            return None
        found = found.get(key)
    return found


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_run(run_dir: Path, *, name: str, max_pools: int) -> RunData:
    """Read one run, finished or not.

    Args:   name: what the page calls it; max_pools: most pools kept for the browser.
    Raises: ValueError if the folder is missing or is no run.
    """
    check_is_run(run_dir)
    problems: list[str] = []
    settings = _read(run_dir / "config.toml", tomllib.loads, problems)
    environment = _read(run_dir / "environment.json", json.loads, problems)
    summary = None
    if (run_dir / "summary.json").exists():
        summary = _read(run_dir / "summary.json", json.loads, problems) or None
    steps, metrics = _read_metrics(run_dir / "metrics.jsonl", problems)
    ledger = read_ledger(run_dir / "pools", max_pools=max_pools, problems=problems)
    return RunData(
        name, settings, environment, summary, steps, metrics, ledger, tuple(problems)
    )  # fmt: skip


def check_is_run(run_dir: Path) -> None:
    """Raises: ValueError if `run_dir` is no folder, or a folder without any file of a run."""
    remedy = "give the run.dir of a run, such as runs/quickstart"
    if not run_dir.is_dir():
        what = "is a file" if run_dir.exists() else "does not exist"
        raise ValueError(
            f"run directory {run_dir} {what}; it must be the folder of a run: {remedy}"
        )
    if not any((run_dir / mark).is_file() for mark in MARKS_OF_A_RUN):
        raise ValueError(
            f"run directory {run_dir} holds none of {', '.join(MARKS_OF_A_RUN)}; the folder of a "
            f"run has at least one: {remedy}"
        )


def _read(path: Path, parse: Any, problems: list[str]) -> dict[str, Any]:
    """The file's table; empty, with a sentence in `problems`, if that fails."""
    try:
        content = parse(path.read_text())
    except FileNotFoundError:
        problems.append(f"{path.name} is missing.")
        return {}
    except (OSError, ValueError) as error:  # both parsers' errors are ValueErrors
        problems.append(f"{path.name} cannot be read: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no table, so it is left out.")
        return {}
    return content


def _read_metrics(path: Path, problems: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps and each metric over them; the last line of a step counts."""
    lines: dict[int, dict[str, Any]] = {}
    bad = 0
    try:
        text = path.read_text(errors="replace")
    except OSError:
        problems.append(f"{path.name} is missing, so there are no curves.")
        text = ""
    for line in text.splitlines():
        try:
            content = json.loads(line)
            step = content["step"]
        except (ValueError, TypeError, KeyError):
            bad += 1
            continue
        if isinstance(step, int) and 0 <= step < 2**53:
            lines[step] = content
        else:
            bad += 1
    if bad:
        problems.append(f"{path.name}: {bad} damaged line{'s' * (bad > 1)} left out.")
    steps = sorted(lines)
    names = sorted({name for line in lines.values() for name in line} - {"step", "non_finite"})
    columns = {
        name: np.array([_value(lines[step].get(name)) for step in steps], np.float64)
        for name in names
    }
    return np.array(steps, np.int64), columns


def _value(value: Any) -> float:
    found = number(value)
    return math.nan if found is None else found
