"""Kills parts of a real run again and again, and sees that it comes back by itself each time.

Victims, moments and instants are drawn from a seed. A moment is a phase that the victim's rank (or
rank 0) is seen in, in its record under run.dir/ranks; a killed rank's record says for good where it
died. Only torchrun itself is started again by hand, with --resume, as a person or scheduler would.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from test_kills import engine_core, rank, server
from tiny_run import TrainerRun

VICTIMS: dict[str, Callable[[TrainerRun], psutil.Process]] = {
    "rank 0": lambda run: rank(run, 0),
    "rank 1": lambda run: rank(run, 1),
    "torchrun": lambda run: psutil.Process(run.process.pid),
    "policy server": lambda run: server(run, "policy"),
    "engine of policy": lambda run: engine_core(run, "policy"),
    "judge server": lambda run: server(run, "judge"),
    "engine of judge": lambda run: engine_core(run, "judge"),
}
PHASES = ("sample", "rollout", "rewrite", "judge", "share", "train", "record", "sync", "checkpoint")
MOMENTS = (*PHASES, "save", "any", "start")
BACK_S, MOMENT_S, GONE_S = 400.0, 60.0, 25.0


@dataclass(frozen=True)
class Kill:
    """One kill: after `step` is done, at the next such moment."""

    step: int
    victim: str
    moment: str


def plan(number: int, *, every: int, seed: int) -> list[Kill]:
    """So many kills, one every few steps: each victim and each moment in turn, in random pairs."""
    draw = random.Random(seed)
    columns = []
    for names in (tuple(VICTIMS), MOMENTS):
        column: list[str] = []
        while len(column) < number:
            column += draw.sample(names, len(names))
        columns.append(column[:number])
    steps = [every * (i + 1) + draw.randrange(max(1, every // 2)) for i in range(number)]
    return [Kill(*kill) for kill in zip(steps, *columns, strict=True)]


@dataclass
class Chaos:
    """A run under attack."""

    launch: Callable[..., TrainerRun]
    recipe: Path
    seed: int
    run: TrainerRun = field(init=False)
    met: Counter[str] = field(default_factory=Counter)
    """Kills by victim and the phase that it, or rank 0, was in."""
    wall_s: float = 0.0

    def go(self, kills: list[Kill]) -> TrainerRun:
        """Run to the end through all kills; fails if the run does not come back from one."""
        self._draw = random.Random(self.seed)
        begun = time.monotonic()
        self.run = self._launch()
        for kill in kills:
            self._wait_for_step(kill.step)
            self._strike(kill)
        self.run.wait(BACK_S)
        assert self.run.process.returncode == 0, self.run.stderr()[-5000:]
        self.wall_s = time.monotonic() - begun
        return self.run

    def _launch(self, *arguments: str) -> TrainerRun:
        return self.launch(self.recipe, *arguments, max_restarts=1000)

    def _strike(self, kill: Kill) -> None:
        if kill.moment == "start":  # while it comes back from another kill
            VICTIMS["rank 1"](self.run).kill()
            self._wait(lambda: self.phase(0)[1] in ("start", "wait for server policy"), BACK_S)
            time.sleep(self._draw.uniform(0, 5))
        else:
            self._wait(lambda: self._is(kill.moment), MOMENT_S)
        victim = self._victim(kill.victim)
        victim.kill()
        step, phase = self.phase(1 if kill.victim == "rank 1" else 0)
        self.met[f"{kill.victim} in {'save' if kill.moment == 'save' else phase}"] += 1
        print(f"killed {kill.victim} in {phase} of step {step}", flush=True)
        if kill.victim == "torchrun":
            self.run.process.wait(30)
            self.run.assert_nothing_left(within_s=GONE_S)
            self.run = self._launch("--resume")

    def _victim(self, name: str) -> psutil.Process:
        """The process; one that is just being started is waited for."""
        deadline = time.monotonic() + BACK_S
        while True:
            try:
                return VICTIMS[name](self.run)
            except (AssertionError, psutil.Error):
                assert time.monotonic() < deadline, f"{name} is not there:\n{self.run.stderr()}"
                time.sleep(0.1)

    def phase(self, number: int) -> tuple[int, str]:
        """Step and phase of a rank, as its record says."""
        try:
            record = json.loads(
                (self.run.run_dir / "ranks" / f"rank{number:05d}.json").read_bytes()
            )
        except (OSError, ValueError):
            return 0, "?"
        return record["step"], record["phase"]

    def _is(self, moment: str) -> bool:
        if moment == "any":
            time.sleep(self._draw.uniform(0, 2))
            return True
        if moment == "save":
            folders = (self.run.run_dir / "checkpoints").glob("step_*")
            return any(not (folder / "manifest.json").exists() for folder in folders)
        return self.phase(0)[1] == moment

    def _wait_for_step(self, step: int) -> None:
        def done() -> bool:
            time.sleep(0.05)
            return any(line["step"] >= step for line in self.run.metrics()[-1:])

        self._wait(done, BACK_S)

    def _wait(self, ready: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not ready():
            said = self.run.stderr()[-5000:] if time.monotonic() > deadline else ""
            assert not said, f"not reached within {within_s} s:\n{said}"
            assert self.run.process.poll() is None, self.run.stderr()[-5000:]

    def useful_share(self) -> float:
        """What the steps would have taken undisturbed, at their median, over all seconds."""
        seconds = {line["step"]: line["time/step_s"] for line in self.run.metrics()}
        return len(seconds) * median(seconds.values()) / self.wall_s


def paid_twice(cache: Path) -> list[str]:
    """Keys of the cache of verdicts and rewrites that were paid for more than once."""
    paid: Counter[str] = Counter()
    for path in cache.glob("*.sqlite"):
        with sqlite3.connect(path) as file:
            paid.update(key for (key,) in file.execute("SELECT key FROM entries"))
    assert paid, f"{cache} holds nothing"
    return [key for key, number in paid.items() if number > 1]


def learned_samples(pools: Path, steps: int) -> list[int]:
    """Ids of the prompts of all steps, in order."""
    from megatron_sip.pool_store import read_pools

    return [
        record.pool.sample.sample_id
        for step in range(steps)
        for record in read_pools(pools, step, dp_rank=0, dp_size=1)
    ]


def assert_equal_to_a_replay(
    run: TrainerRun, launch: Callable[..., TrainerRun], recipe: Path, *, steps: int, batch: int
) -> None:
    """Against a run on the same recorded pools; no prompt is lost or repeated."""
    from test_resume_run import last_checkpoint, learned

    given: Any = launch(recipe, "--pools", str(run.run_dir / "pools")).wait(1200)
    assert given.process.returncode == 0, given.stderr()
    assert last_checkpoint(run) == last_checkpoint(given)
    assert len(learned(run)) == steps
    for found, expected in zip(learned(run), learned(given), strict=True):
        assert found == expected
    assert learned_samples(run.run_dir / "pools", steps) == list(range(steps * batch))
    assert last_checkpoint(run)[1]["consumed_samples"] == steps * batch
