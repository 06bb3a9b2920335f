"""One SIP step: sample, plan, roll out, rewrite, judge, reward, pick, rows, learn, sync."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sip import curriculum
from megatron_sip.config import Config
from megatron_sip.console import StepConsole
from megatron_sip.cost import step_flops
from megatron_sip.errors import StepAbandoned
from megatron_sip.exchange import WeightExchange
from megatron_sip.experience import Experience, pool_means
from megatron_sip.explain.shapes import policy_shape
from megatron_sip.judge.servers import PAID
from megatron_sip.learner import Learner, Means, NotFinite, StepStopped
from megatron_sip.metrics import PhaseTimer, reduce_means
from megatron_sip.mismatch import mismatch_metrics
from megatron_sip.parallel import Ranks, broadcast_rows, gather_objects, shard
from megatron_sip.platform import Platform
from megatron_sip.pool_store import PoolRecord, commit_step, write_pools
from megatron_sip.recovery import publish, with_servers
from megatron_sip.reference import scored_by_a_model, take_reference
from megatron_sip.rows import make_micro_batches
from megatron_sip.serving.supervisor import Supervisor
from megatron_sip.trust.band import breaches, watched
from megatron_sip.types import Plan, TrainRows, TrainState

log = logging.getLogger(__name__)


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
    servers: Supervisor | None = None  # local ones, on rank 0 of a live run
    start_policy: Any = None  # frozen copy of the first weights: second scorer, reference
    reference: Any = None  # see reference.py
    fresh_reference: bool = False
    pending: Any = None  # checkpoint.Pending: the checkpoint that is being written


def run_step(run: Run) -> dict[str, float]:
    """Advance the run by one committed step.

    Returns: metrics on rank 0, an empty dict elsewhere.
    """
    step = run.state.step
    plan = plan_step(run)
    take_reference(run, curriculum.settings_of(run.config, plan))
    records, means = gather_experience(run, plan, step)
    batches = share_rows(run, records)
    learned, gaps, skipped = learn(run, plan, batches)
    advance(run, means, skipped=skipped)
    commit_pools(run, records, means, step)
    synced = sync_weights(run)
    parts = gather_objects((means, learned, synced, gaps), run.ranks)
    return report(run, parts) if run.ranks.is_main else {}


def plan_step(run: Run) -> Plan:
    """Sources, number of rollouts and objective of this step, the same on every rank."""
    if run.config.curriculum is None:
        return Plan("final", ("suffix",), 0, run.config.objective.name)
    return curriculum.plan(run.config, run.state.stats)


def gather_experience(run: Run, plan: Plan, step: int) -> tuple[list[PoolRecord], Means]:
    """Records of this replica's prompts on its I/O rank, nothing elsewhere.

    Raises: StepAbandoned on every rank if a server or judge failed a rank for good.
    """

    def make() -> tuple[list[PoolRecord], Means]:
        assert run.experience is not None
        return run.experience.make(
            plan,
            curriculum.settings_of(run.config, plan),
            step=step,
            first_sample=run.state.consumed_samples,
            positions=shard(run.config.data.global_batch_size, run.ranks),
        )

    records, means = with_servers(run, make, during=f"step {step + 1}") or ([], {})
    check_trust(run, means, step)
    means |= pool_means(records)
    version = run.state.policy_version
    lags = [
        version - c.policy_version for r in records for c in r.pool.candidates
        if c.source == "rollout"
    ]  # fmt: skip
    if lags:
        means["policy/lag"] = (float(sum(lags)), float(len(lags)))
    return records, means


def check_trust(run: Run, means: Means, step: int) -> None:
    """Raises: StepAbandoned on every rank if a look at the judges was outside its band."""
    judge = run.config.judge
    if judge is None or judge.trust is None or run.exchange is None or step < run.replay_until:
        return
    if step % judge.trust.interval == 0:
        names = watched(judge.criteria)
        mine = [value for name in names for value in means.get(name, (0.0, 0.0))]
        sums = _sum_over_replicas(run, *mine)
        pairs = zip(sums[::2], sums[1::2], strict=True)
        wrong = breaches(dict(zip(names, pairs, strict=True)), judge.criteria, judge.trust)
        if wrong:
            raise StepAbandoned(
                f"step {step + 1}: the judges cannot be believed: {'; '.join(wrong)}; see whether "
                "the right model is served and suits its prompt, or lower the band"
            )


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


def learn(run: Run, plan: Plan, batches: list[TrainRows]) -> tuple[Means, np.ndarray, bool]:
    """Reference pass, forward, backward, checks, optimizer step.

    Returns: metrics and engine gaps as `Learner.learn`, and whether the update was left out.
    """
    settings, skipped = curriculum.settings_of(run.config, plan), False
    try:
        with run.timer("train"):
            means, gaps = run.learner.learn(
                batches,
                settings,
                reference=run.reference,
                version=run.state.policy_version,
                fresh_reference=run.fresh_reference,
            )
    except NotFinite as found:
        refuse_to_skip(run, str(found))
        means, gaps, skipped = run.learner.pass_step(), np.zeros(0, np.float32), True
    except StepStopped as stopped:
        raise StepStopped(f"step {run.state.step + 1}: {stopped}") from None
    if run.ranks.is_io:  # one rank a replica
        flops = step_flops(
            policy_shape(run.config.model, vocab_size=run.vocab_size),
            batches,
            uses_reference=scored_by_a_model(run, settings),
            platform_kind=run.platform.kind,
        )
        means["model/flops"] = (flops, 1.0 / run.ranks.dp_size)
    return means, gaps, skipped


def refuse_to_skip(run: Run, reason: str) -> None:
    """Raises: StepStopped if the recipe says so, or if as many steps in a row were skipped."""
    settings, skipped = run.config.optimizer, run.state.skipped_in_a_row
    where = f"step {run.state.step + 1}: {reason}"
    if settings.nonfinite == "stop":
        raise StepStopped(where) from None
    if skipped >= settings.max_skipped_steps:
        raise StepStopped(
            f"{where}; the {skipped} steps before it were skipped for the same reason, and "
            f"optimizer.max_skipped_steps is {settings.max_skipped_steps}"
        ) from None
    log.warning("%s; it is skipped", where)
    if run.ranks.is_main:
        run.console.note(f"{where}; it is skipped")


def advance(run: Run, means: Means, *, skipped: bool) -> None:
    """Move step, data position, version and curriculum; the optimizer has committed.

    A skipped step moves on, too, but its weights are those of the version there is.
    """
    state, stats = run.state, run.state.stats
    if run.config.curriculum is not None:
        wins, compared = _sum_over_replicas(run, *means.get("pool/rollout_win_rate", (0.0, 0.0)))
        prompts = 0 if skipped else run.config.data.global_batch_size
        stats = curriculum.update(
            run.config.curriculum,
            stats,
            win_rate=wins / compared if compared else None,
            suffix_tokens=prompts * run.config.data.suffix_tokens,
        )
    run.state = replace(
        state,
        step=state.step + 1,
        spent=_spent(run, means),
        consumed_samples=state.consumed_samples + run.config.data.global_batch_size,
        policy_version=state.policy_version + (not skipped),
        stats=stats,
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_a_row=state.skipped_in_a_row + 1 if skipped else 0,
    )


def _spent(run: Run, means: Means) -> dict[str, float]:
    """What the run has spent on judges by now: questions, tokens, money."""
    if run.config.judge is None:
        return run.state.spent
    groups = {
        "questions": ("judge/paid",),
        "tokens": ("judge/prompt_tokens", "judge/completion_tokens"),
        "money": ("judge/money",),
    }
    mine = [sum(means.get(n, (0.0, 0.0))[0] for n in names) for names in groups.values()]
    sums = zip(groups, _sum_over_replicas(run, *mine), strict=True)
    return {name: run.state.spent.get(name, 0.0) + value for name, value in sums}


def _sum_over_replicas(run: Run, *values: float) -> list[float]:
    """Sums of the I/O ranks' values on every rank."""
    import torch.distributed as dist

    box = torch.tensor(values, dtype=torch.float64, device=run.platform.device)
    box *= float(run.ranks.is_io)
    dist.all_reduce(box)
    return box.tolist()


def sync_weights(run: Run) -> Means:
    """Hand the new weights to the rollout servers when they are due; those they have are not sent.
    """  # fmt: skip
    if run.exchange is None or run.config.rollout is None:
        return {}
    if run.exchange.version == run.state.policy_version:
        return {}  # every step since was skipped
    replayed = run.state.step < run.replay_until
    due = run.state.step % run.config.rollout.sync_interval == 0
    if replayed or not (due or run.state.step == run.replay_until):
        return {}
    return publish(run)


def commit_pools(run: Run, records: list[PoolRecord], means: Means, step: int) -> None:
    """Write this replica's shard of the ledger; rank 0 marks the step when all are there."""
    import torch.distributed as dist

    if not run.record_pools or step < run.replay_until:
        return
    with run.timer("record"):
        folder = Path(run.config.run.dir)
        if run.ranks.is_io:
            spent = {name: means.get(f"judge/{name}", (0.0, 0.0))[0] for name in PAID}
            write_pools(folder, step, dp_rank=run.ranks.dp_rank, records=records, spent=spent)
        dist.barrier()
        if run.ranks.is_main:
            commit_step(folder, step, num_shards=run.ranks.dp_size)


def report(run: Run, parts: list[tuple[Means, Means, Means, np.ndarray]]) -> dict[str, float]:
    """All ranks' metrics as one dict."""
    metrics = reduce_means([p for part in parts for p in part[:3]])
    gaps = np.concatenate([part[3] for part in parts])
    metrics |= mismatch_metrics(gaps)
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
    metrics |= {f"judge/spent_{name}": value for name, value in state.spent.items()}
    metrics["train/skipped_steps"] = float(state.skipped_steps)
    metrics["data/consumed_samples"] = float(state.consumed_samples)
    metrics["memory/host_peak_gib"] = run.platform.peak_memory_gib()
    return metrics | times
