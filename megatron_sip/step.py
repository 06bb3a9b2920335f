"""One SIP step: sample, plan, roll out, rewrite, judge, reward, pick, rows, learn, sync."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sip import curriculum
from megatron_sip.checkpoint import save_weights
from megatron_sip.config import Config
from megatron_sip.console import StepConsole
from megatron_sip.cost import step_flops
from megatron_sip.exchange import WeightExchange
from megatron_sip.experience import Experience, pool_means
from megatron_sip.explain.shapes import policy_shape
from megatron_sip.learner import Learner, Means, StepStopped, needs_reference
from megatron_sip.metrics import PhaseTimer, reduce_means
from megatron_sip.model import frozen_copy
from megatron_sip.parallel import Ranks, broadcast_rows, gather_objects, shard
from megatron_sip.platform import Platform
from megatron_sip.pool_store import PoolRecord, commit_step, write_pools
from megatron_sip.rows import make_micro_batches
from megatron_sip.types import Plan, TrainRows, TrainState


@dataclass
class Run:
    """What one rank holds while it trains."""

    config: Config
    platform: Platform
    ranks: Ranks
    learner: Learner
    experience: Experience | None  # I/O ranks only
    exchange: WeightExchange | None  # SIP only
    timer: PhaseTimer
    console: StepConsole
    row_length: int  # of padded rows
    row_multiple: int
    pad: int
    vocab_size: int
    state: TrainState
    identity: dict[str, Any]  # of model and tokenizer, for checkpoints
    record_pools: bool
    replay_until: int = 0  # a resumed run learns steps below this from its own committed pools
    start_policy: Any = None  # frozen copy of the first weights: second scorer, reference
    reference: Any = None
    fresh_reference: bool = False


def run_step(run: Run) -> dict[str, float]:
    """Advance the run by one committed step.

    Returns: metrics on rank 0, an empty dict elsewhere.
    """
    step = run.state.step
    plan = plan_step(run)
    take_reference(run, plan)
    records, means = gather_experience(run, plan, step)
    batches = share_rows(run, records)
    learned, gaps = learn(run, plan, batches)
    advance(run, means, learned)
    synced = sync_weights(run)
    commit_pools(run, records, step)
    parts = gather_objects((means, learned, synced, gaps), run.ranks)
    return report(run, parts) if run.ranks.is_main else {}


def plan_step(run: Run) -> Plan:
    """Sources, number of rollouts and objective of this step, the same on every rank."""
    if run.config.curriculum is None:
        return Plan("final", ("suffix",), 0, run.config.objective.name)
    return curriculum.plan(run.config, run.state.stats)


def take_reference(run: Run, plan: Plan) -> None:
    """Freeze a copy of the policy when the first stage that compares with one begins."""
    run.fresh_reference = False
    settings = curriculum.settings_of(run.config, plan)
    if run.reference is None and needs_reference(settings):
        run.reference = run.start_policy
        if run.reference is None or run.state.step > 0:
            run.reference = frozen_copy(
                run.learner.policy, run.config, run.platform, vocab_size=run.vocab_size
            )
        run.state = replace(run.state, reference_version=run.state.policy_version)
        save_weights(
            Path(run.config.run.dir), run.state.policy_version, policy=run.learner.policy,
            identity=run.identity, ranks=run.ranks,
        )  # fmt: skip
        run.fresh_reference = run.config.platform.fp8 is None  # FP8 history moves between passes


def gather_experience(run: Run, plan: Plan, step: int) -> tuple[list[PoolRecord], Means]:
    """Records of this replica's prompts on its I/O rank, nothing elsewhere."""
    if run.experience is None:
        return [], {}
    records, means = run.experience.make(
        plan,
        curriculum.settings_of(run.config, plan),
        step=step,
        first_sample=run.state.consumed_samples,
        positions=shard(run.config.data.global_batch_size, run.ranks),
    )
    means |= pool_means(records)
    version = run.state.policy_version
    lags = [
        version - c.policy_version for r in records for c in r.pool.candidates
        if c.source == "rollout"
    ]  # fmt: skip
    if lags:
        means["policy/lag"] = (float(sum(lags)), float(len(lags)))
    return records, means


def share_rows(run: Run, records: list[PoolRecord]) -> list[TrainRows]:
    """Micro-batches of the picks, handed from the I/O rank to its whole replica."""
    batches = None
    if run.ranks.is_io:
        batches = make_micro_batches(
            [r.pool for r in records],
            [r.picks for r in records],
            micro_batch_size=run.config.data.micro_batch_size,
            layout=run.config.objective.row_layout,
            length=run.row_length,
            multiple=run.row_multiple,
            pad=run.pad,
        )
    with run.timer("share"):
        return broadcast_rows(batches, run.ranks, run.platform)


def learn(run: Run, plan: Plan, batches: list[TrainRows]) -> tuple[Means, np.ndarray]:
    """Reference pass, forward, backward, checks, optimizer step."""
    settings = curriculum.settings_of(run.config, plan)
    try:
        with run.timer("train"):
            means, gaps = run.learner.learn(
                batches,
                settings,
                reference=run.reference,
                version=run.state.policy_version,
                fresh_reference=run.fresh_reference,
            )
    except StepStopped as stopped:
        raise StepStopped(f"step {run.state.step + 1}: {stopped}") from None
    if run.ranks.is_io:  # one rank a replica
        flops = step_flops(
            policy_shape(run.config.model, vocab_size=run.vocab_size),
            batches,
            uses_reference=needs_reference(settings),
            platform_kind=run.platform.kind,
        )
        means["model/flops"] = (flops, 1.0 / run.ranks.dp_size)
    return means, gaps


def advance(run: Run, means: Means, learned: Means) -> None:
    """Move step, data position, version and curriculum; the optimizer has committed."""
    state, stats = run.state, run.state.stats
    if run.config.curriculum is not None:
        wins, compared = _sum_over_replicas(run, means.get("pool/rollout_win_rate", (0.0, 0.0)))
        suffix_tokens = run.config.data.global_batch_size * run.config.data.suffix_tokens
        stats = curriculum.update(
            run.config.curriculum,
            stats,
            win_rate=wins / compared if compared else None,
            suffix_tokens=suffix_tokens,
        )
    run.state = replace(
        state,
        step=state.step + 1,
        consumed_samples=state.consumed_samples + run.config.data.global_batch_size,
        policy_version=state.policy_version + 1,
        stats=stats,
    )


def _sum_over_replicas(run: Run, pair: tuple[float, float]) -> tuple[float, float]:
    """Sum of the I/O ranks' (sum, count) on every rank."""
    import torch.distributed as dist

    mine = pair if run.ranks.is_io else (0.0, 0.0)
    box = torch.tensor(mine, dtype=torch.float64, device=run.platform.device)
    dist.all_reduce(box)
    return float(box[0]), float(box[1])


def sync_weights(run: Run) -> Means:
    """Hand the new weights to the rollout servers when they are due."""
    if run.exchange is None or run.config.rollout is None:
        return {}
    replayed = run.state.step < run.replay_until
    due = run.state.step % run.config.rollout.sync_interval == 0
    if replayed or not (due or run.state.step == run.replay_until):
        return {}
    return run.exchange.sync(run.state.policy_version, run.timer)


def commit_pools(run: Run, records: list[PoolRecord], step: int) -> None:
    """Write this replica's shard of the ledger; rank 0 marks the step when all are there."""
    import torch.distributed as dist

    if not run.record_pools or step < run.replay_until:
        return
    with run.timer("record"):
        folder = Path(run.config.run.dir)
        if run.ranks.is_io:
            write_pools(folder, step, dp_rank=run.ranks.dp_rank, records=records)
        dist.barrier()
        if run.ranks.is_main:
            commit_step(folder, step, num_shards=run.ranks.dp_size)


def report(run: Run, parts: list[tuple[Means, Means, Means, np.ndarray]]) -> dict[str, float]:
    """All ranks' metrics as one dict."""
    metrics = reduce_means([p for part in parts for p in part[:3]])
    gaps = np.concatenate([part[3] for part in parts])
    if len(gaps):
        size = np.abs(gaps)
        metrics |= {
            "rollout/logprob_mismatch": float(size.mean()),
            "rollout/logprob_mismatch_p99": float(np.quantile(size, 0.99)),
            "rollout/logprob_mismatch_max": float(size.max()),
            # k3 estimator of KL(engine || trainer) on tokens that the engine sampled
            "rollout/kl": float(np.mean(np.expm1(gaps.astype(np.float64)) - gaps)),
        }
    state = run.state
    if run.config.curriculum is not None:
        metrics |= {
            "curriculum/stage": state.stats["stage"],
            "curriculum/win_rate": state.stats["win_rate"],
            "policy/version": float(state.policy_version),
        }
    times = run.timer.take()
    if "rollout/length" in metrics and times.get("time/rollout_s"):
        generated = sum(part[0].get("rollout/length", (0.0, 0.0))[0] for part in parts)
        metrics["rollout/tokens_per_s"] = generated / times["time/rollout_s"]
    if metrics.get("judge/verdicts") and times.get("time/judge_s"):
        metrics["judge/verdicts_per_s"] = metrics["judge/verdicts"] / times["time/judge_s"]
    metrics["data/consumed_samples"] = float(state.consumed_samples)
    metrics["memory/host_peak_gib"] = run.platform.peak_memory_gib()
    return metrics | times
