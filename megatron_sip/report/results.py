"""What came out, in words and in one picture; tables of results and of differing settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, SubElement

import numpy as np
from markupsafe import Markup

from megatron_sip.report import svg
from megatron_sip.report.curves import NUM_COLOURS
from megatron_sip.report.read_run import RunData, number, section

IDENTITY = ("run.dir",)  # settings that differ between any two runs


@dataclass(frozen=True)
class Tile:
    """One number with its name and where it came from."""

    label: str
    value: str
    detail: str


def percent(value: float, digits: int = 1) -> str:
    return svg.minus(f"{100 * value:.{digits}f} %")


def duration(seconds: float) -> str:
    """Seconds as 321 s -> "5 min 22 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def planned_steps(run: RunData) -> int | None:
    found = number(section(run.settings, "run", "steps"))
    return None if found is None else int(found)


def last_step(run: RunData) -> int:
    return int(run.steps[-1]) if len(run.steps) else 0


def interval(run: RunData) -> tuple[float, float] | None:
    """95 % interval of the win rate."""
    ends = run.evaluation.get("win_rate_ci")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = number(ends[0]), number(ends[1])
    return None if low is None or high is None else (low, high)


def headline(run: RunData) -> tuple[str, str, str]:
    """The big sentence in three parts: before the number, the number, after it."""
    rate, count = number(run.evaluation.get("win_rate")), number(run.evaluation.get("n"))
    if rate is not None:
        of = f"of {count:.0f} held-out prefixes " if count is not None else ""
        return "The trained policy wins", percent(rate), f"{of}against its own start."
    end = number(run.evaluation.get("heldout_nll_end"))
    start = number(run.evaluation.get("heldout_nll_start"))
    if end is not None and start is not None:
        verb = "fell" if end < start else "rose"
        return f"Held-out NLL {verb} from {start:.3f} to", f"{end:.3f}", "nats a token."
    planned = planned_steps(run)
    done = f"{last_step(run)} of {planned} steps" if planned else f"{last_step(run)} steps"
    if run.summary is None:
        return "No result yet:", done, "are logged."
    return "No evaluation in this run:", done, "are logged."


def reading(run: RunData) -> str:
    """What the interval says, in words."""
    ends = interval(run)
    if ends is None:
        return ""
    text = f"95 % interval {percent(ends[0])} to {percent(ends[1])}"
    if ends[0] > 0.5:
        return f"{text}, all of it above 50 %: better than the start."
    if ends[1] < 0.5:
        return f"{text}, all of it below 50 %: worse than the start."
    return f"{text}, 50 % within: no difference is shown."


def tiles(run: RunData) -> list[Tile]:
    """Held-out NLL, distinct-2, second scorer, judge score, time; those that the run has."""
    found = [
        _moved(run, "Held-out NLL", "heldout_nll", "nats a token; lower is better"),
        _moved(run, "Distinct-2", "distinct2", "share of different bigrams; higher is more varied"),
        _moved(
            run,
            "Judge score",
            "judge_score",
            "mean score by the judge on held-out prefixes",
            change=False,
        ),
    ]
    second = number(run.evaluation.get("second_win_rate"))
    if second is not None:
        detail = "win rate under the start policy's likelihood, which gave no reward"
        found.insert(2, Tile("Second scorer", percent(second), detail))
    return [tile for tile in (*found, _time(run)) if tile is not None]


def _moved(run: RunData, label: str, key: str, what: str, *, change: bool = True) -> Tile | None:
    start = number(run.evaluation.get(f"{key}_start"))
    end = number(run.evaluation.get(f"{key}_end"))
    if start is None or end is None:
        return None
    moved = f"{end - start:+.3f}"
    if change and start:
        moved = f"{100 * (end / start - 1):+.1f} %"
    detail = f"from {svg.minus(f'{start:.3f}')} ({svg.minus(moved)}), {what}"
    return Tile(label, svg.minus(f"{end:.3f}"), detail)


def _time(run: RunData) -> Tile | None:
    steps = run.metrics.get("time/step_s", np.zeros(0))
    steps = steps[np.isfinite(steps)]
    whole = number(section(run.summary or {}, "seconds"))
    detail = f"{last_step(run)} steps"
    if len(steps):
        detail += f", {np.median(steps):.1f} s each (median), {duration(float(steps.sum()))} in all"
    samples = number(section(run.summary or {}, "consumed_samples"))
    if samples is not None:
        detail += f"; {samples:.0f} prefixes"
    if whole is not None:
        return Tile("Time", duration(whole), f"whole command, evaluation included; {detail}")
    return Tile("Time in steps", duration(float(steps.sum())), detail) if len(steps) else None


def forest(runs: Sequence[RunData]) -> Markup | None:
    """Win rates with their intervals on one scale of 0 to 100 %; None if no run has one."""
    rows = _win_rates(runs)
    if not rows:
        return None
    root = Element("svg", {"class": "forest", "height": str(46 * len(rows)), "role": "img",
                           "aria-label": "Win rates with 95 % intervals"})  # fmt: skip
    for tick in (0, 25, 50, 75, 100):
        at = f"{tick}%"
        kind = "even" if tick == 50 else "second"
        SubElement(root, "line", {"class": kind, "x1": at, "x2": at, "y1": "0", "y2": "100%"})
        anchor = {0: "start", 100: "end"}.get(tick, "middle")
        svg.text(root, f"{tick} %", x=at, y="100%", dy="1.4em", text_anchor=anchor,
                 class_="second-name")  # fmt: skip
    for row, (label, rate, ends, classes) in enumerate(rows):
        top = 46 * row
        svg.text(root, label, x="0", y=str(top + 13), class_="role")
        if ends is not None:
            x1, x2 = (svg.percent(100 * end) for end in ends)
            place = {"x1": x1, "x2": x2, "y1": str(top + 30), "y2": str(top + 30)}
            SubElement(root, "line", {**place, "class": f"whisker {classes}"})
        at = svg.percent(100 * rate)
        place = {"x1": at, "x2": at, "y1": str(top + 20), "y2": str(top + 40)}
        SubElement(root, "line", {**place, "class": f"estimate {classes}"})
    return svg.render(root)


def _win_rates(
    runs: Sequence[RunData],
) -> list[tuple[str, float, tuple[float, float] | None, str]]:
    rows = []
    for r, run in enumerate(runs):
        colour, name = f"c{r % NUM_COLOURS}", f"{run.name}: " if len(runs) > 1 else ""
        rate = number(run.evaluation.get("win_rate"))
        if rate is not None:
            rows.append((f"{name}judge {percent(rate)}", rate, interval(run), colour))
        second = number(run.evaluation.get("second_win_rate"))
        if second is not None and len(runs) == 1:
            rows.append((f"second scorer {percent(second)}", second, None, "c1"))
    return rows


def side_by_side(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(name, one cell a run) of what the page says about each run; "-" where one has it not."""
    columns = []
    for run in runs:
        ends, rate = interval(run), number(run.evaluation.get("win_rate"))
        column = {} if rate is None else {"Win rate": percent(rate)}
        if ends is not None:
            column["95 % interval"] = f"{percent(ends[0])} to {percent(ends[1])}"
        for tile in tiles(run):
            moved = tile.detail.split(", ")[0] if tile.detail.startswith("from ") else ""
            column[tile.label] = f"{tile.value} {moved}".strip()
        columns.append(column)
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, [column.get(name, "-") for column in columns]) for name in names]


def result_table(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(name, one cell a run) of everything in summary.json, nested names dotted."""
    flat = [flatten(run.summary or {}) for run in runs]
    names = list(dict.fromkeys(name for cells in flat for name in cells))
    return [(name, [cell(cells.get(name)) for cells in flat]) for name in names]


def differing(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(setting, one cell a run) where the recipes differ; "-" where one lacks the key."""
    flat = [flatten(run.settings) for run in runs]
    names = sorted({name for cells in flat for name in cells} - set(IDENTITY))
    rows = [(name, [cell(cells.get(name)) for cells in flat]) for name in names]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as {"a.b": value}; a table in a list is named by its place or its `name`."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = {str(item.get("name", i)): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix and tree != {} else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def cell(value: Any) -> str:
    """One table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value) or "[]"
    return str(value)
