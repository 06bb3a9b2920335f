"""Recipes with sinks, and what a service is expected to hold after a run and its resumption."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_sip.config import Config
from megatron_sip.recipe import load_config
from megatron_sip.sinks.opening import open_logger
from megatron_sip.sinks.progress import Progress

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.toml"
ODD = {"grad_norm": math.nan, "reward/is-safe": math.inf}  # one number each that JSON has not


def recipe(run_dir: Path, *overrides: str) -> Config:
    return load_config(RECIPE, (f"run.dir={run_dir}", *overrides))


def log_steps(
    config: Config,
    steps: range,
    *,
    after: int = 0,
    replayed: tuple[int, ...] = (),
    shift: float = 0,
) -> list[str]:
    """Open all sinks, log `loss` = step + shift on each step, close; what a person was told."""
    told: list[str] = []
    progress = Progress(lambda: "train")
    with open_logger(config, progress, told.append, after=after) as logger, progress:
        for step in steps:
            metrics = {"loss": step + shift, **(ODD if step == 2 else {})}
            logger.log(step, metrics, replayed=step in replayed)
    return told


EXPECTED = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 105.0, 6: 106.0}


def killed_and_resumed(config: Config) -> None:
    """Steps 1 to 4, killed; from the checkpoint of step 2 again, 3 and 4 from their pools."""
    log_steps(config, range(1, 5))
    log_steps(config, range(3, 7), after=2, replayed=(3, 4), shift=100.0)
