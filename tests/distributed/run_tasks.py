"""Whole steps of a run without servers: references, skipped steps, checkpoints, resume."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cases
import numpy as np
import tasks
import xxhash
from workers import Context

from megatron_sip import curriculum, resume, train
from megatron_sip.config import Config
from megatron_sip.console import SilentConsole
from megatron_sip.learner import StepStopped
from megatron_sip.metrics import PhaseTimer
from megatron_sip.objectives import picks_of
from megatron_sip.pool_store import PoolRecord
from megatron_sip.step import Run, run_step
from megatron_sip.types import TrainState

SERVER = {"kind": "connect", "url": "http://127.0.0.1:1", "model": "m", "tokenizer": "t"}
RECIPE: dict[str, Any] = {
    "run": {"task": "sip", "steps": 8},
    "platform": {"kind": "cpu"},
    "optimizer": {"lr": 1e-2},
    "data": {
        "tokenizer": "t", "train": "a", "validation": "b", "test": "c",
        "prefix_tokens": cases.LONGEST_PREFIX, "min_prefix_tokens": 5,
        "suffix_tokens": cases.SUFFIX, "global_batch_size": cases.NUM_POOLS, "micro_batch_size": 2,
    },
    "servers": {"policy": SERVER, "judge": SERVER},
    "rollout": {"server": "policy", "num_rollouts": 4, "weight_transfer": "shared_memory",
                "max_logprob_mismatch": 1.0},
    "judge": {"criteria": [{"form": "likelihood", "name": "l", "server": "judge"}],
              "cache_dir": "c"},
    "rewriter": {"server": "judge", "prompt": "p", "max_tokens": 8},
    "objective": {"name": "dpo", "pair_sources": ["rollout"]},
    "curriculum": {"kind": "emergent", "sources": ["suffix", "rewrite", "rollout"]},
    "checkpoint": {"interval": 4, "keep_last": 1},
    "evaluation": {"num_prefixes": 4, "server": "judge"},
}  # fmt: skip


def recipe(ctx: Context, run_dir: Path, changes: dict[str, dict[str, Any]]) -> Config:
    tree = RECIPE | {k: RECIPE.get(k, {}) | v for k, v in changes.items()}
    tree["run"] = tree["run"] | {"dir": str(run_dir)}
    tree["model"] = cases.tiny_model(tied=False).model_dump(mode="json")
    tree["parallel"] = ctx.parallel.model_dump(mode="json")
    return Config.model_validate_json(json.dumps(tree))


@dataclass
class Pools:
    """The pools of `cases`, judged otherwise in each step; in `bad` ones a weight is NaN."""

    bad: tuple[int, ...]
    last_replica: bool

    def make(self, plan: Any, settings: Any, *, step: int, first_sample: int, positions: Any):
        pools, rewards = cases.pools_of(cases.CASES["dpo_two_pairs"])
        rewards = [
            replace(r, total=np.roll(np.nan_to_num(r.total), step).astype(np.float32),
                    valid=np.ones(len(r.valid), bool))
            for r in rewards
        ]  # fmt: skip
        picks = picks_of(pools, rewards, settings, seed=1)
        if step in self.bad and self.last_replica:
            picks[-1] = tuple(replace(p, weight=math.nan) for p in picks[-1])
        return [PoolRecord(step, int(i), pools[i], rewards[i], (), picks[i]) for i in positions], {}


def build(ctx: Context, config: Config, bad: tuple[int, ...], *, seed: int) -> Run:
    """A run as `assembly` builds one, with these pools in place of servers."""
    assert config.curriculum is not None
    last = ctx.ranks.dp_rank == ctx.ranks.dp_size - 1
    return Run(
        config=config, platform=ctx.platform, ranks=ctx.ranks,
        learner=tasks.build_learner(ctx, config.model, seed=seed),
        experience=Pools(bad, last) if ctx.ranks.is_io else None, exchange=None,
        timer=PhaseTimer(), console=SilentConsole(), row_length=tasks.LENGTH, row_multiple=1, pad=0,
        vocab_size=cases.VOCAB,
        state=TrainState(0, 0, 0, curriculum.initial_stats(config.curriculum), {}),
        identity=tasks.identity_of(config.model), record_pools=False,
    )  # fmt: skip


def steps(
    ctx: Context, run_dir: Path, changes: dict[str, Any], bad: tuple[int, ...], resumed: bool
) -> dict[str, Any]:
    """The run from its start or its latest checkpoint to its end, with what it held at each step.

    A checkpoint is written after step 4, and after the last one.
    """
    config = recipe(ctx, run_dir, changes)
    run = build(ctx, config, bad, seed=9 if resumed else 1)
    if resumed:
        resume.restore(run)
    train.begin(run, {}, resumed)
    seen: dict[int, Any] = {}
    stopped = None
    while run.state.step < config.run.steps:
        step = run.state.step
        try:
            metrics = run_step(run)
        except StepStopped as error:
            stopped = str(error)
            break
        train.settle(run, wait=False)
        if run.state.step in (4, config.run.steps):
            train.save(run)
        whole = {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))}
        seen[step] = {
            "state": run.state, "metrics": whole, "weights": held(run.learner.policy.module),
            "reference": run.reference if isinstance(run.reference, str) else held(run.reference),
        }  # fmt: skip
    train.settle(run)
    folder = run_dir / "checkpoints"
    kept = sorted(p.name for p in folder.iterdir() if p.is_dir())
    return {"steps": seen, "stopped": stopped, "kept": kept}


def held(module: Any) -> str:
    """Digest of this rank's weights."""
    digest = xxhash.xxh3_128()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()
