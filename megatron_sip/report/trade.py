"""What the reward costs: held-out NLL and diversity beside the judge's score and the win rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from xml.etree.ElementTree import SubElement

import numpy as np
from markupsafe import Markup

from megatron_sip.metrics import metric
from megatron_sip.report import results, svg
from megatron_sip.report.curves import NUM_COLOURS, Chart, Points, logged
from megatron_sip.report.read_run import RunData, number, section

KNOWN = {
    "win_rate": ("Win rate over the start", "fraction", "Held-out prefixes won under the judge."),
    "judge_score": ("Judge score", "score", "Mean over continuations of held-out prefixes."),
    "nll": ("Held-out NLL", "nats/token", "True suffixes of held-out prefixes; lower is better."),
    "distinct2": (
        "Distinct-2",
        "fraction",
        "Different bigrams among all bigrams of continuations.",
    ),
}
"""eval/NAME -> title, unit, note."""


def charts(runs: Sequence[RunData]) -> Iterator[Chart]:
    """What the reward costs: eval/* over steps where it was logged, else start and end."""
    for name, (title, unit, note) in KNOWN.items():
        quantities = {"at the end": _evaluated(name)}
        if name == "win_rate":
            ends = {"95 % low": "eval/win_rate_low", "95 % high": "eval/win_rate_high"}
            quantities |= {label: logged(metric_name) for label, metric_name in ends.items()}
        yield Chart(title, unit, quantities, note)
    others = {n for run in runs for n in run.metrics if n.startswith("eval/")}
    for name in sorted(others - {f"eval/{n}" for n in KNOWN}):
        if not name.startswith("eval/win_rate_"):
            yield Chart(name, _unit(name), {name: logged(name)})


def _unit(name: str) -> str:
    try:
        return metric(name).unit
    except ValueError:  # of another release
        return ""


def _evaluated(name: str) -> Callable[[RunData], Points]:
    """eval/NAME over steps; without it NAME_start and NAME_end of summary.json.

    Never both: they are of validation and of test prefixes.
    """
    key = "heldout_nll" if name == "nll" else name

    def points(run: RunData) -> Points:
        steps, values = logged(f"eval/{name}")(run)
        seen = {int(s): v for s, v in zip(steps, values, strict=True) if math.isfinite(v)}
        end = number(section(run.summary or {}, "steps"))
        ends = () if seen else ((0.0, "_start"), (end, "_end"))
        for at, suffix in ends:
            value = number(run.evaluation.get(key + suffix))
            if at is not None and value is not None:
                seen[int(at)] = value
        order = sorted(seen)
        return np.array(order, np.float64), np.array([seen[s] for s in order], np.float64)

    return points


def plane(runs: Sequence[RunData]) -> Markup | None:
    """Win rate over the change of distinct-2, one dot a run; None for fewer than two dots."""
    dots = []
    for r, run in enumerate(runs):
        rate = number(run.evaluation.get("win_rate"))
        start = number(run.evaluation.get("distinct2_start"))
        end = number(run.evaluation.get("distinct2_end"))
        if rate is not None and start and end is not None:
            ends = results.interval(run) or (rate, rate)
            dots.append((run.name, 100 * (end / start - 1), rate, ends, f"c{r % NUM_COLOURS}"))
    if len(dots) < 2:
        return None
    x = [dot[1] for dot in dots]
    y = [100 * v for dot in dots for v in (*dot[3], 0.5)]
    gap = 0.15 * (max(x) - min(x)) or 1.0
    axes = svg.Axes((min(x) - gap, max(x) + gap), (min(y) - 2, max(y) + 2))
    root = svg.frame(
        axes, unit="win rate, %", title="Win rate over the change of distinct-2",
        x_name="change of distinct-2, %", whole=False,
    )  # fmt: skip
    svg.draw_guide(root, axes, 50, "even")
    for name, change, rate, ends, colour in dots:
        px, py = axes.at(change, 100 * rate)
        ys = [svg.percent(axes.at(change, 100 * v)[1]) for v in ends]
        at = {"x1": svg.percent(px), "x2": svg.percent(px), "y1": ys[0], "y2": ys[1]}
        SubElement(root, "line", {**at, "class": f"whisker {colour}"})
        place = {"cx": svg.percent(px), "cy": svg.percent(py), "r": "6"}
        SubElement(root, "circle", {**place, "class": f"dot {colour}"})
        svg.text(root, name, x=svg.percent(px), y=svg.percent(py), dx="11", dy="0.35em",
                 class_="role halo")  # fmt: skip
    return svg.render(root)
