"""The curves of the page: which numbers stand in one picture, and their drawing.

One run: a colour is a quantity, faint is each step, bold a running mean. Several runs: a colour
is a run, a dash pattern a quantity, and running means only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_sip.report import svg
from megatron_sip.report.read_run import RunData, number, section

MAX_POINTS = 400  # of one curve; longer ones are drawn as means of equal groups of steps
SOURCES = ("suffix", "rewrite", "rollout")
NUM_COLOURS = 8

Points = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclass(frozen=True)
class Chart:
    """One picture, before drawing."""

    title: str
    unit: str
    quantities: dict[str, Callable[[RunData], Points]]  # legend label -> its points in a run
    note: str = ""
    log: bool = False
    guides: Callable[[RunData], dict[str, float]] = field(default=lambda run: {})
    fixed: tuple[float, ...] = ()  # (low, high) of the y axis


@dataclass(frozen=True)
class Drawn:
    """One picture as the page holds it."""

    title: str
    unit: str
    note: str
    picture: Markup
    legend: tuple[tuple[str, str, str], ...]  # label, classes, last value
    data: dict[str, Any]  # for the readout under the pointer


def logged(name: str) -> Callable[[RunData], Points]:
    """Points of a metric of metrics.jsonl."""

    def points(run: RunData) -> Points:
        return run.steps, run.metrics.get(name, np.full(len(run.steps), math.nan))

    return points


def rewarded(source: str, name: str) -> Callable[[RunData], Points]:
    """Points of a mean reward over the pools."""

    def points(run: RunData) -> Points:
        values = run.ledger.means.get((source, name), [math.nan] * len(run.ledger.steps))
        return np.array(run.ledger.steps, np.int64), np.array(values, np.float64)

    return points


def judge_gap(run: RunData) -> Points:
    """Chosen minus rejected reward."""
    steps, chosen = logged("reward/chosen")(run)
    return steps, chosen - logged("reward/rejected")(run)[1]


def mismatch_limit(run: RunData) -> dict[str, float]:
    limit = number(section(run.settings, "rollout", "max_logprob_mismatch"))
    return {"limit of the recipe": limit} if limit else {}


def charts(runs: Sequence[RunData]) -> Iterator[Chart]:
    """All pictures that these runs could have; those without points are dropped when drawn."""
    yield Chart("Loss", "nats", {"loss": logged("loss")},
                "Sum of the objective's terms, by their weights.")  # fmt: skip
    yield Chart(
        "DPO loss", "nats/pair", {"DPO loss": logged("objective/dpo")},
        "ln 2 = 0.693 where the policy equals its reference.",
        guides=lambda run: {"ln 2": math.log(2)} if "objective/dpo" in run.metrics else {},
    )  # fmt: skip
    yield Chart("SimPO loss", "nats/pair", {"SimPO loss": logged("objective/simpo")},
                "Of mean log-probs, without a reference.")  # fmt: skip
    yield Chart("GRPO loss", "advantage", {"GRPO loss": logged("objective/grpo")},
                "Minus the clipped, ratio-weighted advantage of a live rollout.")  # fmt: skip
    yield Chart(
        "Next-token loss while training", "nats/token",
        {"targets": logged("objective/nll"), "suffix": logged("objective/suffix_nll"),
         "prefix": logged("objective/prefix_nll"), "chosen": logged("objective/chosen_nll")},
        "Negative log-likelihood of the training text itself.",
    )  # fmt: skip
    yield Chart(
        "Reward by source", "reward", {s: rewarded(s, "total") for s in SOURCES},
        "Total reward, mean over the valid candidates of the pools.",
    )  # fmt: skip
    criteria = sorted({name for run in runs for _, name in run.ledger.means} - {"total"})
    for name in criteria:
        yield Chart(f"Criterion: {name}", "score", {s: rewarded(s, name) for s in SOURCES},
                    f'Score under "{name}" alone, before weights.')  # fmt: skip
    yield Chart(
        "Is a rollout the best of its pool?", "fraction of pools",
        {"rollout is best": logged("pool/rollout_chosen_rate"),
         "by chance": logged("pool/rollout_chance_rate")},
        "By chance: had the best been drawn at random.", fixed=(-0.04, 1.04),
    )  # fmt: skip
    yield Chart(
        "Rollouts against the suffix", "fraction won",
        {"win rate": logged("pool/rollout_win_rate"), "smoothed": logged("curriculum/win_rate")},
        "Rollouts with more reward than the document's own continuation.", fixed=(-0.04, 1.04),
        guides=lambda run: {"even": 0.5} if "pool/rollout_win_rate" in run.metrics else {},
    )  # fmt: skip
    yield Chart("Judge gap", "reward", {"chosen minus rejected": judge_gap},
                "How much better the judge finds the chosen than the rejected.")  # fmt: skip
    yield Chart(
        "Margin learned", "nats",
        {"margin": logged("objective/margin"), "chosen": logged("objective/chosen_logratio"),
         "rejected": logged("objective/rejected_logratio")},
        "Log-ratio of policy to reference, summed over a candidate.",
    )  # fmt: skip
    yield Chart(
        "Log-probs of pairs", "nats/token",
        {"chosen": logged("objective/chosen_logprob"),
         "rejected": logged("objective/rejected_logprob")},
        "What SimPO compares: the mean log-prob of a candidate's token.",
    )  # fmt: skip
    yield Chart("Pairs in the right order", "fraction of live pairs",
                {"margin above 0": logged("objective/margin_accuracy")},
                "Pairs whose chosen gained on its rejected.", fixed=(-0.04, 1.04))  # fmt: skip
    yield Chart("Ratio to the rollout engine", "mean of tokens",
                {"ratio": logged("objective/ratio")},
                "Policy over engine probability; 1 where both are the same.")  # fmt: skip
    yield Chart("Clipped tokens", "fraction", {"clipped": logged("objective/clip_fraction")},
                "Tokens whose ratio to the rollout's policy is clipped: no gradient.",
                fixed=(-0.04, 1.04))  # fmt: skip
    yield Chart("KL to the reference", "nats/token",
                {"KL": logged("objective/kl_reference")},
                "Estimated on the rollouts' own tokens.")  # fmt: skip
    yield Chart("Entropy of the policy", "nats/token", {"entropy": logged("objective/entropy")},
                "Where live tokens are scored; a fall to 0 is collapse.")  # fmt: skip
    yield Chart(
        "Trainer against rollout engine", "nats, log scale",
        {"mean": logged("rollout/logprob_mismatch"), "p99": logged("rollout/logprob_mismatch_p99"),
         "largest": logged("rollout/logprob_mismatch_max")},
        "Difference of log-probabilities on the rollouts' tokens.", log=True, guides=mismatch_limit,
    )  # fmt: skip


def draw(chart: Chart, runs: Sequence[RunData], *, smooth: bool = True) -> Drawn | None:
    """The picture of one chart, None where no run has a point of it.

    Args: smooth: draw a running mean beside the points (else dots).
    """
    lines = curves_of(chart, runs)
    guides = {name: value for run in runs for name, value in chart.guides(run).items()}
    axes = svg.axes_for(lines, log=chart.log, include=guides.values(), fixed=chart.fixed)
    if axes is None:
        return None
    root = svg.frame(axes, unit=chart.unit, title=f"{chart.title}, {chart.unit}, over steps")
    for name, value in guides.items():
        svg.draw_guide(root, axes, value, name)
    canvas = svg.stretched(root)
    for line in lines:
        if not smooth:
            svg.draw_line(canvas, axes, line)
            svg.draw_dots(root, axes, line)
            continue
        if len(runs) == 1:
            svg.draw_line(canvas, axes, line, extra="raw")
        svg.draw_line(canvas, axes, running_mean(line))
    drawing = svg.render(root)
    return Drawn(
        chart.title, chart.unit, chart.note, drawing, legend(chart, runs, lines), readout(lines)
    )  # fmt: skip


def curves_of(chart: Chart, runs: Sequence[RunData]) -> list[svg.Line]:
    """One line for each quantity of each run that has a finite point."""
    lines = []
    for r, run in enumerate(runs):
        for q, (label, points) in enumerate(chart.quantities.items()):
            x, y = points(run)
            if not np.isfinite(y).any():
                continue
            classes = f"c{(q if len(runs) == 1 else r) % NUM_COLOURS} d{q % 3}"
            name = f"{run.name}, {label}"
            if len(runs) == 1:
                name, classes = label, classes.replace(f"d{q % 3}", "d0")
            elif len(chart.quantities) == 1:
                name = run.name
            lines.append(svg.Line(name, *thin(x, y), classes))
    return lines


def legend(
    chart: Chart, runs: Sequence[RunData], lines: Sequence[svg.Line]
) -> tuple[tuple[str, str, str], ...]:
    """(label, classes, last value) of each line; of the dashes alone if there are many lines."""
    if len(runs) > 1 and len(chart.quantities) > 1:
        dashes = {line.classes.split()[1] for line in lines}
        named = [(label, f"d{q % 3}") for q, label in enumerate(chart.quantities)]
        return tuple((label, f"c7 {dash}", "") for label, dash in named if dash in dashes)
    return tuple((line.label, line.classes, last_value(line.y)) for line in lines)


def readout(lines: Sequence[svg.Line]) -> dict[str, Any]:
    """Plain numbers for the pointer's readout: {"low", "high", "lines": [{label, x, y}]}."""
    x = np.concatenate([line.x[np.isfinite(line.y)] for line in lines])
    return {
        "low": int(x.min()), "high": int(x.max()),
        "lines": [
            {"label": line.label, "x": line.x.tolist(),
             "y": [None if not math.isfinite(v) else float(f"{v:.5g}") for v in line.y.tolist()]}
            for line in lines
        ],
    }  # fmt: skip


def last_value(values: np.ndarray) -> str:
    """The last finite value, four digits."""
    return short(float(values[np.isfinite(values)][-1]))


def short(value: float) -> str:
    """A number as people read it: four digits."""
    plain = f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.1e}"
    return svg.minus(plain)


def thin(x: np.ndarray, y: np.ndarray) -> Points:
    """Means over equal groups of steps, so that at most MAX_POINTS points remain."""
    size = math.ceil(len(x) / MAX_POINTS)
    if size <= 1:
        return x, y
    starts = range(0, len(x), size)
    means = [
        float(np.mean(part[np.isfinite(part)])) if np.isfinite(part).any() else math.nan
        for part in (y[i : i + size] for i in starts)
    ]
    return np.array([x[min(i + size, len(x)) - 1] for i in starts]), np.array(means)


def window(length: int) -> int:
    """Odd number of points of the running mean."""
    return 2 * (length // 24) + 1


def running_mean(line: svg.Line) -> svg.Line:
    """Mean over the finite neighbours within `window`; a gap stays a gap."""
    half = window(len(line.y)) // 2
    smooth = np.full(len(line.y), math.nan)
    for i in np.flatnonzero(np.isfinite(line.y)):
        part = line.y[max(0, i - half) : i + half + 1]
        smooth[i] = part[np.isfinite(part)].mean()
    return svg.Line(line.label, line.x, smooth, line.classes)
