"""Results of judging again: a table for people, JSON for programs, a picture of both judges."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatron_sip.config import Config
from megatron_sip.data.maintenance.inspect_view import inert
from megatron_sip.judge.agreement import MEASURES, Agreement, mean_or_none, summarize
from megatron_sip.judge.calibration import CHANCE
from megatron_sip.judge.rejudge import Results, Task, Watch
from megatron_sip.publish import atomic_file

SCHEMA_VERSION = 1
MAX_BINS = 40  # steps of the curve; more are joined
MAX_POINTS = 4000  # of the scatter, evenly spaced
NAMES = {
    "same_best": "same best candidate",
    "same_worst": "same worst candidate",
    "spearman": "Spearman rank correlation",
    "kendall": "Kendall tau-b",
    "pair_order": "chosen still above rejected",
}
DRAWN = ("same_best", "same_worst", "kendall", "pair_order")


def check_output(path: Path) -> None:
    """Raises: ValueError if the name is not of a .parquet file, or stands in a ledger."""
    if path.suffix != ".parquet":
        raise ValueError(f"--output {path}: the file name must end in .parquet")
    if any(path.parent.glob("step_*.done")):
        raise ValueError(f"--output {path} is in a folder of recorded pools; name another place")
    for found in (path, path.with_suffix(".json"), path.with_suffix(".png")):
        if found.is_dir():
            raise ValueError(f"--output {path}: {found} is a folder; name another file")


@contextmanager
def progress_line() -> Iterator[Watch]:
    """A line on stderr while the block runs: pools, questions a second, time left.

    Yields: what to call after each batch, with pools done, pools in all, questions so far.
    """
    columns = (TextColumn("judge pools"), BarColumn(20),
               TextColumn("{task.fields[rates]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True, markup=False)) as progress:
        task = progress.add_task("judge", total=None, rates="")
        start_s = time.monotonic()

        def watch(done: int, total: int, questions: int) -> None:
            rate = questions / max(time.monotonic() - start_s, 1e-9)
            rates = f"{done:,} of {total:,} pools, {questions:,} questions, {rate:,.1f} questions/s"
            progress.update(task, completed=done, total=total, rates=rates)

        yield watch


def summary(config: Config, task: Task, results: Results) -> dict[str, Any]:
    """What the .json file holds; no number in it is NaN."""
    assert config.judge is not None
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "judge": config.judge.model_dump(
            mode="json", include={"criteria", "schedule", "both_orders"}
        ),
        "servers": {name: str(server.model) for name, server in _asked(config)},
        "seed": config.run.seed,
    }
    if results.pools:
        agreements = _agreements(config, results)
        found["ledger"] = {
            "pools": [str(path) for path in task.pools],
            "steps": [min(results.steps), max(results.steps)],
            "num_pools": len(results.pools),
            "num_candidates_compared": sum(pool.compared for pool in results.pools),
        }
        found["agreement"] = {row.measure: _without(row, "measure") for row in agreements}
        found["by_step"] = [
            {"first_step": first, "last_step": last, "pools": number, **means}
            for first, last, number, means in by_step(results)
        ]
        found["costs"] = results.costs
    if results.accuracies:
        rows = {row.name: _without(row, "name") for row in results.accuracies}
        found["calibration"] = {
            "file": str(task.calibration), "chance": CHANCE, "accuracy": rows,
            "costs": results.calibration_costs,
        }  # fmt: skip
    return found


def publisher(config: Config, task: Task) -> Callable[[Results, Path], None]:
    """What `rejudge` calls at its end: writes FILE.json, and FILE.png where pools were judged."""

    def publish(results: Results, output: Path) -> None:
        text = json.dumps(summary(config, task, results), indent=2, allow_nan=False) + "\n"
        with ExitStack() as stack:
            named = stack.enter_context(atomic_file(output.with_suffix(".json")))
            named.write_text(text, encoding="utf-8")
            if results.pools:
                picture = stack.enter_context(atomic_file(output.with_suffix(".png")))
                plot(config, results, picture)

    return publish


def by_step(results: Results) -> list[tuple[int, int, int, dict[str, float | None]]]:
    """(first step, last step, pools, mean of each measure); at most MAX_BINS of them."""
    steps = sorted(set(results.steps))
    number = min(len(steps), MAX_BINS)
    bin_of = {step: i * number // len(steps) for i, step in enumerate(steps)}
    rows = []
    for i in range(number):
        mine = [n for n, step in enumerate(results.steps) if bin_of[step] == i]
        inside = [results.steps[n] for n in mine]
        means = {m: mean_or_none([results.pools[n].values[m] for n in mine]) for m in MEASURES}
        rows.append((min(inside), max(inside), len(mine), means))
    return rows


def plot(config: Config, results: Results, path: Path) -> None:
    """Agreement by step beside its chance level, and the two rewards of each candidate.

    Raises: ValueError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('the plot needs matplotlib; pip install "megatron_sip[eval]"') from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = by_step(results)
    chance = {row.measure: row.chance for row in _agreements(config, results)}
    for i, name in enumerate(DRAWN):
        middles = [(first + last) / 2 for first, last, _, means in bins if means[name] is not None]
        values = [means[name] for *_, means in bins if means[name] is not None]
        left.plot(middles, values, marker="o", markersize=3, color=f"C{i}", label=NAMES[name])
        if chance[name] is not None:
            left.axhline(chance[name], color=f"C{i}", linestyle=":", linewidth=1)
    left.set(xlabel="step of the ledger", ylabel="agreement (dotted: chance)", ylim=(-1.05, 1.05))
    left.grid(alpha=0.3)
    left.legend(fontsize="small", loc="lower left")
    places = np.linspace(0, len(results.points) - 1, min(len(results.points), MAX_POINTS))
    shown = [results.points[int(i)] for i in places.round()]
    for i, source in enumerate(("suffix", "rewrite", "rollout")):
        mine = [(x, y) for found, x, y in shown if found == source]
        if mine:
            right.scatter(*zip(*mine, strict=True), s=6, alpha=0.5, color=f"C{i}", label=source)
            right.legend(fontsize="small")
    right.set(xlabel="reward in the ledger", ylabel="reward of the other judge")
    right.grid(alpha=0.3)
    figure.suptitle(f"{len(results.pools):,} pools judged again", parse_math=False)
    figure.savefig(path, format="png", dpi=120)


def print_results(config: Config, results: Results, console: Console) -> None:
    """Tables of agreement and accuracy, and what they cost."""
    if results.pools:
        compared = sum(pool.compared for pool in results.pools)
        console.print(Text(f"\n{len(results.pools):,} pools, {compared:,} candidates compared"))
        table = _table("agreement", ">mean", ">95 % interval", ">chance", ">pools")
        for row in _agreements(config, results):
            interval = _interval(row.low, row.high)
            _row(table, NAMES[row.measure], _number(row.mean), interval, _number(row.chance),
                 f"{row.pools:,}")  # fmt: skip
        console.print(table)
        console.print(Text(_paid(results.costs)), soft_wrap=True)
    if results.accuracies:
        console.print(Text(f"\nlabelled pairs (chance {CHANCE})"))
        table = _table("criterion", ">accuracy", ">95 % interval", ">better first",
                       ">better second", ">same in both orders", ">95 % interval", ">pairs",
                       ">missing")  # fmt: skip
        for row in results.accuracies:
            _row(table, row.name, _number(row.accuracy), _interval(row.low, row.high),
                 _number(row.better_first), _number(row.better_second), _number(row.consistent),
                 _interval(row.consistent_low, row.consistent_high), f"{row.pairs:,}",
                 f"{row.missing:,}")  # fmt: skip
        console.print(table)
        console.print(Text(_paid(results.calibration_costs)), soft_wrap=True)


def _asked(config: Config) -> list[tuple[str, Any]]:
    """(name, server) of those that criteria ask."""
    assert config.judge is not None
    names = [n for c in config.judge.criteria if c.form != "novelty" for n in c.servers]
    return [(name, config.servers[name]) for name in dict.fromkeys(names)]


def _agreements(config: Config, results: Results) -> tuple[Agreement, ...]:
    return summarize(
        results.pools,
        documents=results.documents,
        resamples=config.evaluation.bootstrap,
        seed=config.run.seed,
    )


def _paid(costs: dict[str, float]) -> str:
    """One sentence on what was asked and paid."""
    money = f", money {costs['money']:,.4f}" if costs.get("money") else ""
    return (
        f"{costs['verdicts']:,.0f} questions: {costs['cache_hits']:,.0f} known before, "
        f"{costs['missing']:,.0f} without a verdict; paid for {costs['paid']:,.0f} with "
        f"{costs['prompt_tokens']:,.0f} prompt and {costs['completion_tokens']:,.0f} completion "
        f"tokens{money}, {costs['seconds']:,.1f} s"
    )


def _without(row: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != name}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _table(*columns: str) -> Table:
    """Columns whose name begins with ">" hold numbers and stand to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        justify = "right" if name.startswith(">") else "left"
        table.add_column(Text(name.removeprefix(">")), justify=justify)
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(inert(cell)) for cell in cells))
