"""Put the page together: read, draw, fill the template, write one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from megatron_sip.publish import atomic_write
from megatron_sip.report import curves, results, times, trade
from megatron_sip.report.read_run import RunData, check_is_run, read_run

MAX_POOLS = 200  # in the pool browser, all runs together
FOLDER = Path(__file__).parent


def write_report(run_dir: Path, output: Path, compare: Sequence[Path] = ()) -> None:
    """Write one self-contained HTML page about a run, finished or not.

    Args:   run_dir: the run that the page is about.
            output: the file to write or replace; its folder exists.
            compare: further runs, shown beside the first.
    Raises: ValueError if a run directory is missing or no run, or if `output` has no folder or
            is one. What is damaged inside a run stands on the page instead.
    """
    folders = [Path(run_dir), *map(Path, compare)]
    for folder in folders:
        check_is_run(folder)
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else f"lies in {output.parent}, which is no folder"
        raise ValueError(f"output {output} {what}; give the path of a file in an existing folder")
    share = max(1, MAX_POOLS // len(folders))
    runs = [
        read_run(folder, name=name, max_pools=share)
        for folder, name in zip(folders, _names(folders), strict=True)
    ]
    atomic_write(output, page(runs).encode(errors="replace"))


def page(runs: Sequence[RunData]) -> str:
    """HTML of the page about `runs`, the first being the subject."""
    style, script = _file("report.css"), _file("report.js")
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = [curves.draw(chart, runs) for chart in curves.charts(runs)]
    costs = [curves.draw(chart, runs, smooth=False) for chart in trade.charts(runs)]
    drawn = {"learning": [c for c in charts if c], "trade": [c for c in costs if c]}
    pools = [{"run": r, **pool} for r, run in enumerate(runs) for pool in run.ledger.pools]
    environment.filters["breakable"] = breakable
    return environment.get_template("report.html").render(
        runs=runs,
        main=runs[0],
        results=results,
        drawn=drawn,
        plane=trade.plane(runs),
        window=curves.window(min(len(runs[0].steps), curves.MAX_POINTS)),
        timing=[_timing(run) for run in runs],
        num_pools=len(pools),
        pools_read=sum(run.ledger.pools_read for run in runs),
        max_pools=MAX_POOLS,
        data=as_json({"runs": [run.name for run in runs], "pools": pools}),
        chart_data=as_json([c.data for c in (*drawn["learning"], *drawn["trade"])]),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def breakable(name: Any) -> Markup:
    """The escaped name, which may be broken after underscores and slashes."""
    text = escape(name)
    for mark in "_/":
        text = text.replace(mark, Markup(f"{mark}<wbr>"))
    return text


def as_json(value: Any) -> Markup:
    """JSON that may stand inside a <script type="application/json">: it holds no "<"."""
    plain = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(plain.replace("<", "\\u003c"))


def _timing(run: RunData) -> dict[str, Any]:
    """The parts of the section on time of one run."""
    index = times.median_step(run)
    found = times.timeline(run, index) if index is not None else None
    return {
        "run": run,
        "bars": times.bars(run),
        "table": times.table(run),
        "timeline": found,
        "step": int(run.steps[index]) if index is not None else None,
        "seconds": float(run.metrics["time/step_s"][index]) if index is not None else None,
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names, each once."""
    paths = [folder.resolve() for folder in folders]
    short = [path.name for path in paths]
    names = [
        name if short.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(short, paths, strict=True)
    ]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _file(name: str) -> str:
    return (FOLDER / name).read_text()


def _hash(content: str) -> str:
    """Source expression of a Content-Security-Policy that allows exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
