"""Speed and memory as ratios against a named baseline, measured in one run.

A benchmark is a function without arguments that returns {"name", "settings", "results", "ratios"}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sip.benchmark.loss_head import loss_head
from megatron_sip.benchmark.shared_prefix import shared_prefix

BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "loss-head": loss_head,
    "shared-prefix": shared_prefix,
}
