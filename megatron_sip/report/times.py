"""Where the time went: phases of every step as stacked bars, and one step over all roles.

metrics.jsonl has the seconds of each phase on rank 0, not when it began: the timeline puts the
phases in the loop's fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import SubElement

import numpy as np
from markupsafe import Markup

from megatron_sip.report import svg
from megatron_sip.report.read_run import RunData, section

ORDER = ("sample", "rollout", "rewrite", "judge", "share", "reference", "train", "sync", "record",
         "evaluate", "checkpoint")  # fmt: skip
MAX_BARS = 120  # more steps are drawn as means of equal groups
SMALL, LARGE = 0.01, 0.1  # below SMALL of all time and LARGE of any bar: drawn as "other"
VISIBLE = 1e-3  # share of a step that a role must work to have its line in the timeline
SERVERS = {"rollout": ("rollout",), "rewrite": ("rewriter",), "judge": ("judge",),
           "sync": ("rollout",), "evaluate": ("rollout", "judge")}  # fmt: skip
"""Phase -> the services that work in it; trainer alone where absent."""
TRAINER_TOO = ("sync", "evaluate")


@dataclass(frozen=True)
class PhaseRow:
    """One line of the table of phases."""

    name: str
    classes: str
    mean_s: float  # a step
    share: float  # of all time, fraction


def phases(run: RunData) -> dict[str, np.ndarray]:
    """Phase -> seconds of each step, in the loop's order; "other" is the rest of time/step_s."""
    found = {
        name.removeprefix("time/").removesuffix("_s"): np.nan_to_num(values)
        for name, values in run.metrics.items()
        if name.startswith("time/") and name.endswith("_s")
    }
    total = found.pop("step", None)
    known = [p for p in ORDER if p in found]
    ordered = {p: found[p] for p in [*known, *sorted(found.keys() - set(known))]}
    if total is not None:
        rest = total - sum(ordered.values(), np.zeros(len(total)))
        ordered["other"] = np.maximum(rest, 0.0)
    return ordered


def phase_class(name: str) -> str:
    """Colour of a phase, the same in every picture."""
    return f"p-{name}" if name in ORDER else "p-other"


def table(run: RunData) -> list[PhaseRow]:
    """Mean seconds and share of each phase, the longest first."""
    found = phases(run)
    total = float(sum(v.sum() for v in found.values())) or 1.0
    rows = [
        PhaseRow(name, phase_class(name), float(v.mean()), float(v.sum()) / total)
        for name, v in found.items()
        if len(v)
    ]
    return sorted(rows, key=lambda row: -row.mean_s)


def bars(run: RunData) -> tuple[Markup, int] | None:
    """Stacked bars and the number of steps in one bar; None without times."""
    found = phases(run)
    if not found or not len(run.steps):
        return None
    size = math.ceil(len(run.steps) / MAX_BARS)
    starts = range(0, len(run.steps), size)
    means = {n: np.array([v[i : i + size].mean() for i in starts]) for n, v in found.items()}
    whole = sum(means.values(), np.zeros(len(starts)))
    grouped = {
        n: v for n, v in means.items()
        if n != "other" and (v.sum() >= SMALL * whole.sum() or (v > LARGE * whole).any())
    }  # fmt: skip
    grouped["other"] = whole - sum(grouped.values(), np.zeros(len(starts)))
    top = float(whole.max()) * 1.04 or 1.0
    axes = svg.Axes((0.5, len(starts) + 0.5), (0.0, top))
    named = svg.Axes((float(run.steps[0]) - 0.5, float(run.steps[-1]) + 0.5), (0.0, top))
    root = svg.frame(named, unit="seconds", title="Seconds of each step, by phase")
    canvas = svg.stretched(root)
    for i in range(len(starts)):
        below = 0.0
        for name, values in grouped.items():
            x, y = axes.at(i + 0.58, below + float(values[i]))
            x1, y1 = axes.at(i + 1.42, below)
            below += float(values[i])
            if y1 - y > 0.01:
                place = {"x": f"{10 * x:.1f}", "y": f"{10 * y:.1f}"}
                extent = {"width": f"{10 * (x1 - x):.1f}", "height": f"{10 * (y1 - y):.1f}"}
                SubElement(canvas, "rect", {**place, **extent, "class": phase_class(name)})
    return svg.render(root), size


def median_step(run: RunData) -> int | None:
    """Index of the step of median length; None without times."""
    seconds = run.metrics.get("time/step_s")
    if seconds is None:
        return None
    order = [i for i in np.argsort(seconds, kind="stable") if math.isfinite(seconds[i])]
    return int(order[(len(order) - 1) // 2]) if order else None


def timeline(run: RunData, index: int) -> tuple[Markup, list[tuple[str, float]]]:
    """One step over all roles.

    Args:    index: of the step in `run.steps`.
    Returns: picture, and (role, share of the step in which it works) from the trainer on.
    """
    spans, end = [], 0.0
    for name, values in phases(run).items():
        if name != "other":  # its place in the step is unknown
            spans.append((name, end, end + float(values[index])))
            end += float(values[index])
    end = end or 1.0
    roles = _roles(run, [name for name, start, stop in spans if stop - start > VISIBLE * end])
    axes = svg.Axes((0.0, end), (0.0, float(len(roles))))
    root = svg.Element("svg", {"class": "timeline", "height": str(44 * len(roles)), "role": "img",
                               "aria-label": "One step over all roles"})  # fmt: skip
    _time_grid(root, axes)
    busy = []
    for row, role in enumerate(roles):
        worked = [span for span in spans if role in _workers(run, span[0])]
        busy.append((role, sum(stop - start for _, start, stop in worked) / end))
        svg.text(root, role, x="0", y=str(44 * row + 12), class_="role")
        track = {"x": "0", "width": "100%", "y": str(44 * row + 18), "height": "18"}
        SubElement(root, "rect", {**track, "class": "track", "rx": "3"})
        for name, start, stop in worked:
            x, width = axes.at(start, 0)[0], 100 * (stop - start) / end
            place = {**track, "x": svg.percent(x), "width": svg.percent(width)}
            bar = SubElement(root, "rect", {**place, "class": phase_class(name)})
            SubElement(bar, "title").text = f"{name}: {stop - start:.3f} s"
    return svg.render(root), busy


def _time_grid(root: svg.Element, axes: svg.Axes) -> None:
    inside = svg.ticks(*axes.x, 5)
    for place in inside:
        at = svg.percent(axes.at(place, 0)[0])
        SubElement(root, "line", {"class": "second", "x1": at, "x2": at, "y1": "0", "y2": "100%"})
        label = svg.tick_label(place, inside[1] if len(inside) > 1 else 1.0)
        svg.text(root, f"{label} s", x=at, y="100%", dy="1.3em", class_="second-name",
                 text_anchor="start" if place == 0 else "middle")  # fmt: skip


def _workers(run: RunData, phase: str) -> list[str]:
    """Roles that work in a phase."""
    servers = [_server(run, service) for service in SERVERS.get(phase, ())]
    return ["trainer", *servers] if not servers or phase in TRAINER_TOO else servers


def _server(run: RunData, service: str) -> str:
    """Name of the server behind a service of the recipe."""
    if service == "judge":
        criteria = section(run.settings, "judge", "criteria")
        names = [section(c, "server") for c in criteria] if isinstance(criteria, list) else []
        name = next((n for n in names if n), None)
    else:
        name = section(run.settings, service, "server")
    if isinstance(name, list):
        return f"{', '.join(map(str, name))} servers"
    return f"{name} server" if isinstance(name, str) else f"server of {service}"


def _roles(run: RunData, worked: Sequence[str]) -> list[str]:
    """The trainer, then the servers in the order in which they are first needed."""
    return list(dict.fromkeys(["trainer", *(r for p in worked for r in _workers(run, p))]))
