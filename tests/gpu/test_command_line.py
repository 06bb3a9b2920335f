"""The real command line on one GPU: pretraining, resumption, and SIP from recorded pools."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_tasks
import numpy as np
import pytest
from test_resume_run import last_checkpoint, learned
from tiny_run import NTP, PIECES, ROOT, SIP, TrainerRun, Workplace, make_workplace

from megatron_sip.config_objective import DpoObjective, GrpoObjective, Objective
from megatron_sip.objectives import picks_of
from megatron_sip.pool_store import PoolRecord, commit_step, write_pools
from megatron_sip.types import Candidate, CandidatePool, PoolRewards, SipSample

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]

STEPS, BATCH = 6, 4
CONNECT = {"kind": "connect", "url": "http://127.0.0.1:9", "model": "judge"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Tokenizer, datasets and judge in a folder, of this project's own documents."""
    texts = {
        f"{path.stem}-{i}": section
        for path in sorted((ROOT / "docs").glob("*.md"))
        for i, section in enumerate(path.read_text().split("\n## "))
    }
    return make_workplace(tmp_path_factory.mktemp("gpu"), texts)


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., TrainerRun]]:
    runs: list[TrainerRun] = []

    def start(recipe: Path, *arguments: str) -> TrainerRun:
        runs.append(TrainerRun(recipe, *arguments, num_ranks=1, torchrun=True))
        return finished(runs[-1])

    yield start
    for run in runs:
        shutil.rmtree(run.temp_dir, ignore_errors=True)


def finished(run: TrainerRun) -> TrainerRun:
    run.wait(200)
    assert run.process.returncode == 0, run.stderr()
    run.assert_nothing_left(within_s=15)
    return run


def on_gpu(place: Workplace, base: dict[str, Any], name: str, **changes: Any) -> Path:
    return place.recipe(
        base, name, platform={"kind": gpu_tasks.KIND, "deterministic": True},
        parallel__world_size=1, checkpoint__interval=STEPS // 2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(place: Workplace, launch: Callable[..., TrainerRun]) -> TrainerRun:
    return launch(on_gpu(place, NTP, "ntp", run__steps=STEPS))


def went_back(run: TrainerRun, recipe: Path, step: int) -> None:
    """The run directory of `recipe` as it was after `step`, from that of a finished run."""
    folder = recipe.with_suffix("")
    shutil.copytree(run.run_dir, folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "latest").write_text(f"step_{step:08d}")


def test_pretraining_lowers_the_loss_and_writes_its_summary(pretrained: TrainerRun) -> None:
    losses = [line["loss"] for line in pretrained.metrics()]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    even = 2 * math.log(PIECES)  # of an even choice, in suffix and prefix
    assert even - 1 < losses[0] < even + 1
    summary = json.loads((pretrained.run_dir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["eval"]["heldout_nll_end"] < summary["eval"]["heldout_nll_start"]
    log = (pretrained.run_dir / "logs" / "trainer.log").read_text()
    assert "the first update gave the same bits twice" in log


def test_resumed_pretraining_equals_one_in_one_go(
    place: Workplace, launch: Callable[..., TrainerRun], pretrained: TrainerRun
) -> None:
    recipe = on_gpu(place, NTP, "ntp-resumed", run__steps=STEPS)
    went_back(pretrained, recipe, STEPS // 2)
    resumed = launch(recipe, "--resume")
    assert last_checkpoint(resumed) == last_checkpoint(pretrained)
    assert learned(resumed) == learned(pretrained)


def recorded(folder: Path, objective: Objective) -> Path:
    """Pools of three rollouts with rewards, made of numbers: no judge, no rollout server."""
    rng = np.random.default_rng(7)

    def ids() -> np.ndarray:
        return rng.integers(3, PIECES, 16).astype(np.int32)

    for step in range(STEPS):
        pools, rewards = [], []
        for position in range(BATCH):
            sample = SipSample(step * BATCH + position, 0, 16, ids(), ids())
            engine = np.full(16, -6.0, np.float32)
            rollouts = (Candidate("rollout", ids(), "o", engine, -1, "length") for _ in range(3))
            pools.append(CandidatePool(sample, "prefix", tuple(rollouts), 1.0))
            total, valid = rng.permutation(3).astype(np.float32), np.ones(3, bool)
            rewards.append(PoolRewards({"likelihood": total}, total, valid, 0, valid))
        picks = picks_of(pools, rewards, objective, seed=step)
        records = [
            PoolRecord(step, position, pool, reward, (), chosen)
            for position, (pool, reward, chosen) in enumerate(
                zip(pools, rewards, picks, strict=True)
            )
        ]
        write_pools(folder, step, dp_rank=0, records=records)
        commit_step(folder, step, num_shards=1)
    return folder / "pools"


@pytest.mark.parametrize(
    "objective",
    [DpoObjective(name="dpo", row_layout="shared_prefix"), GrpoObjective(name="grpo")],
    ids=["dpo", "grpo"],
)
def test_recorded_pools_are_learned_from_the_same_way_each_time(
    place: Workplace, launch: Callable[..., TrainerRun], pretrained: TrainerRun,
    objective: Objective,
) -> None:  # fmt: skip
    name = objective.name
    pools = recorded(place.folder / f"recorded-{name}", objective)
    changes: dict[str, Any] = {
        "run__steps": STEPS,
        "model__init": {"kind": "megatron", "path": str(pretrained.run_dir)},
        "servers": {"policy": {**CONNECT, "model": "policy"},
                    "judge": {**CONNECT, "tokenizer": str(place.judge)}},
        "rollout__weight_transfer": "nccl" if gpu_tasks.KIND == "cuda" else "shared_memory",
        "objective": {"name": name, "row_layout": objective.row_layout},
    }  # fmt: skip
    runs = [
        launch(on_gpu(place, SIP, f"{name}-{i}", **changes), "--pools", str(pools))
        for i in range(2 if name == "dpo" else 1)
    ]
    lines = runs[0].metrics()
    assert len(lines) == STEPS and all(math.isfinite(line["loss"]) for line in lines)
    if name == "dpo":
        assert lines[0]["objective/margin"] == 0.0 != lines[-1]["objective/margin"]
        assert last_checkpoint(runs[1]) == last_checkpoint(runs[0])
        assert learned(runs[1]) == learned(runs[0])
