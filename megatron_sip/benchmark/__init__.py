"""Benchmarks: what a part of the trainer costs, beside the plain way to do the same.

Each is a function in a file of its own that measures on this machine, in this process, and returns

    {"name", "settings": what was measured, "results": numbers with units in their names,
     "ratios": {name: number}}

Times are interleaved, so that what else runs on the machine harms both sides alike.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

BENCHMARKS = (
    "checkpoint", "dataset-start", "judge-attacks", "judge-client", "judge-schedules",
    "judge-tokens", "loss-head", "preprocess", "shared-prefix", "weight-sync",
)  # fmt: skip


def run(name: str) -> dict[str, Any]:
    """Measure one of BENCHMARKS; imports what it needs and no more."""
    return import_module(f"megatron_sip.benchmark.{name.replace('-', '_')}").run()


def text(found: dict[str, Any]) -> str:
    """A benchmark's numbers for reading: one table for each part."""
    lines = [str(found["name"])]
    for part in ("settings", "results", "ratios"):
        rows = {name: _shown(value) for name, value in found[part].items()}
        width = max(map(len, rows), default=0)
        lines += ["", part, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "  ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if type(value) is int else str(value)
