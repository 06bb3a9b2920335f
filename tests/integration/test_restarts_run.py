"""torchrun's restarts and a rank that stands still: the real command line, without servers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_kills import rank
from test_resume_run import last_checkpoint, learned, wait_for
from tiny_run import NTP

pytestmark = pytest.mark.full
STEPS = 60


def output(run: Any) -> str:
    return Path(run.out.name).read_text() + run.stderr()


def test_ranks_that_die_before_and_after_the_first_checkpoint_change_nothing(
    workplace: Any, launch: Any
) -> None:
    changes = {"run__steps": STEPS, "checkpoint__interval": 20}
    straight = launch(workplace.recipe(NTP, "never-restarted", **changes)).wait()
    run = launch(workplace.recipe(NTP, "restarted", **changes), max_restarts=2)
    wait_for(run, lambda: len(run.metrics()) > 3)
    rank(run, 0).kill()
    wait_for(run, lambda: "restart 1 of 2" in output(run))
    assert not (run.run_dir / "checkpoints" / "latest").exists()
    wait_for(run, lambda: (run.run_dir / "checkpoints" / "latest").exists())
    rank(run, 1).kill()
    run.wait()
    assert run.process.returncode == 0, run.stderr()
    said = output(run)
    assert "restart 1 of 2: rank 0 (process" in said and "restart 2 of 2: rank 1 (process" in said
    assert "resumed after step" in said
    assert last_checkpoint(run) == last_checkpoint(straight)
    assert learned(run) == learned(straight)


def test_what_stays_wrong_is_not_tried_again(workplace: Any, launch: Any) -> None:
    changes = {"optimizer__lr": 1e30, "optimizer__warmup_steps": 0, "optimizer__clip_grad": 1e30}
    run = launch(workplace.recipe(NTP, "nan-again", **changes), max_restarts=2).wait()
    assert run.process.returncode != 0
    assert run.stderr().count("error: not restarted, it would fail again: step") == 2
    assert "lower optimizer.lr" in run.errors()[-1]


def test_a_rank_that_stands_still_is_named_and_its_wait_is_logged(
    workplace: Any, launch: Any
) -> None:
    recipe = workplace.recipe(NTP, "frozen", run__steps=5000, run__hang_timeout_s=3.0)
    run = launch(recipe)
    wait_for(run, lambda: len(run.metrics()) > 3)
    frozen = rank(run, 1)
    frozen.suspend()
    wait_for(run, lambda: "no progress for" in output(run), within_s=60)
    assert f"(run.hang_timeout_s): rank 1 (process {frozen.pid})" in output(run)
    log = (run.run_dir / "logs" / "trainer.log").read_text()
    assert "has not moved for" in log and "train_steps" in log
    frozen.resume()
    steps = len(run.metrics())
    wait_for(run, lambda: len(run.metrics()) > steps + 3)  # nothing was ended for it
    os.killpg(run.process.pid, signal.SIGTERM)
    run.process.wait(60)
