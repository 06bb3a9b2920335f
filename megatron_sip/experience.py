"""What an I/O rank gathers for one step: samples, rollouts, rewrites, verdicts, picks.

`LiveExperience` asks servers, `RecordedExperience` replays the ledger of a run, and
`PlainExperience` (next-token prediction) only samples. All return the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_sip.config_judge import Guards
from megatron_sip.config_objective import Objective, needs_rewards
from megatron_sip.data.sample_reader import SampleReader
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.judge.guards import GUARDS
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.pair_scores import order_consistency
from megatron_sip.judge.scoring import vote_agreement
from megatron_sip.judge.servers import PAID
from megatron_sip.learner import Means
from megatron_sip.metrics import METRICS, PhaseTimer
from megatron_sip.objectives import picks_of
from megatron_sip.pool import assemble_pool, rollout_wins, suffix_candidate
from megatron_sip.pool_store import PoolRecord, read_pools, read_spent
from megatron_sip.rewriting.rewriter import Rewriter
from megatron_sip.rollout.vllm_engine import VllmEngine
from megatron_sip.trust.look import Watch
from megatron_sip.types import (
    Candidate,
    CandidatePool,
    Pick,
    Plan,
    PoolRewards,
    SipSample,
    Verdict,
)


class Experience(Protocol):
    """Makes the records of this rank's prompts of one step."""

    def make(
        self, plan: Plan, settings: Objective, *, step: int, first_sample: int,
        positions: np.ndarray,
    ) -> tuple[list[PoolRecord], Means]:  # fmt: skip
        """Args: first_sample: sample id of position 0 of the global batch.
        positions: this rank's part of the global batch.
        """
        ...


def no_rewards(num_candidates: int) -> PoolRewards:
    """Rewards of a pool that nobody judged."""
    nan = np.full(num_candidates, np.nan, np.float32)
    no = np.zeros(num_candidates, bool)
    return PoolRewards({}, nan, no, 0, no)


@dataclass
class PlainExperience:
    """Samples alone: next-token prediction."""

    reader: SampleReader
    timer: PhaseTimer

    def make(self, plan, settings, *, step, first_sample, positions):
        with self.timer("sample"):
            samples = self.reader.read(first_sample, positions)
        pools = [CandidatePool(sample, "", (), 0.0) for sample in samples]
        rewards = [no_rewards(0) for _ in pools]
        picks = picks_of(pools, rewards, settings, seed=0)  # without candidates there is no chance
        records = [
            PoolRecord(step, int(p), pool, reward, (), pick)
            for p, pool, reward, pick in zip(positions, pools, rewards, picks, strict=True)
        ]
        return records, {}


@dataclass
class LiveExperience:
    """Asks the rollout, rewriter and judge servers."""

    reader: SampleReader
    tokenizer: Tokenizer
    engine: VllmEngine
    judge: Judge
    rewriter: Rewriter | None
    timer: PhaseTimer
    seed: int
    min_candidate_tokens: int
    guards: Guards
    dp_size: int
    watch: Watch | None = None

    def make(self, plan, settings, *, step, first_sample, positions):
        with self.timer("sample"):
            samples = self.reader.read(first_sample, positions)
        with self.timer("rollout"):
            rollouts = self._rollouts(samples, plan, step)
        seconds = self.engine.seconds if any(rollouts) else {}
        with self.timer("rewrite"):
            rewrites, means = self._rewrites(samples, plan)
        pools = self._pools(samples, plan, rollouts, rewrites)
        rewards, verdicts, judge_stats = self._judged(pools, settings)
        picks = picks_of(pools, rewards, settings, seed=self.seed)
        records = [
            PoolRecord(step, int(position), *rest)
            for position, rest in zip(
                positions, zip(pools, rewards, verdicts, picks, strict=True), strict=True
            )
        ]
        means |= self._totals("pool", dropped(pools))
        means |= self._totals("judge", judge_stats)
        means |= rollout_means(rollouts)
        means |= {f"rollout/server_s/{name}": (s, 1.0) for name, s in seconds.items()}
        if self.watch is not None and self.watch.is_due(step):
            with self.timer("trust"):
                means |= self.watch.look(step, records)
            for name, value in self.watch.spent.items():
                known, share = means.get(f"judge/{name}", (0.0, 1.0 / self.dp_size))
                means[f"judge/{name}"] = known + value, share
        return records, means

    def _totals(self, group: str, counts: Mapping[str, float]) -> Means:
        """Counts as (sum, count) pairs whose mean over replicas' pairs is the global sum."""
        share = 1.0 / self.dp_size
        return {
            f"{group}/{name}": (float(value), share)
            for name, value in counts.items()
            if f"{group}/{name}" in METRICS
        }

    def _rollouts(
        self, samples: Sequence[SipSample], plan: Plan, step: int
    ) -> list[list[Candidate]]:
        if "rollout" not in plan.sources:
            return [[] for _ in samples]
        return self.engine.generate(samples, plan.num_rollouts, seed=self.seed, step=step)

    def _rewrites(
        self, samples: Sequence[SipSample], plan: Plan
    ) -> tuple[list[Candidate | None], Means]:
        if "rewrite" not in plan.sources or self.rewriter is None:
            return [None] * len(samples), {}
        rewrites, stats = self.rewriter.rewrite(samples, seed=self.seed)
        return rewrites, self._totals("rewrite", stats)

    def _judged(
        self, pools: Sequence[CandidatePool], settings: Objective
    ) -> tuple[list[PoolRewards], list[tuple[Verdict, ...]], dict[str, float]]:
        """Rewards, verdicts, counts; nobody is asked for an objective that heeds no reward."""
        if not needs_rewards(settings):
            return [no_rewards(len(p.candidates)) for p in pools], [()] * len(pools), {}
        with self.timer("judge"):
            return self.judge.judge_pools(pools, seed=self.seed)

    def _pools(
        self,
        samples: Sequence[SipSample],
        plan: Plan,
        rollouts: Sequence[Sequence[Candidate]],
        rewrites: Sequence[Candidate | None],
    ) -> list[CandidatePool]:
        """Pools in the order suffix, rewrite, rollouts."""
        pools = []
        for sample, mine, rewrite in zip(samples, rollouts, rewrites, strict=True):
            prefix_text, suffix_text = self.tokenizer.continuation_text(
                sample.prefix_ids, sample.suffix_ids
            )
            members = [suffix_candidate(sample, suffix_text)] if "suffix" in plan.sources else []
            members += [rewrite] if rewrite is not None else []
            pools.append(
                assemble_pool(
                    sample,
                    prefix_text,
                    suffix_text,
                    [*members, *mine],
                    min_tokens=self.min_candidate_tokens,
                    guards=self.guards,
                )
            )
        return pools


@dataclass
class RecordedExperience:
    """Replays the committed pools of a run directory, at any data-parallel size."""

    pools_dir: Path
    dp_rank: int
    dp_size: int

    def make(self, plan, settings, *, step, first_sample, positions):
        records = read_pools(self.pools_dir, step, dp_rank=self.dp_rank, dp_size=self.dp_size)
        if [r.position for r in records] != positions.tolist():
            raise ValueError(
                f"{self.pools_dir}: step {step} holds {len(records)} pools for this rank, the "
                f"recipe wants {len(positions)}; use the data.global_batch_size of the recording"
            )
        spent = read_spent(self.pools_dir, step) if self.dp_rank == 0 else {}
        share = 1.0 / self.dp_size
        return records, {f"judge/{name}": (spent.get(name, 0.0), share) for name in PAID}


@dataclass
class ResumedExperience:
    """The committed pools while there are some, then the live source."""

    recorded: RecordedExperience
    live: Experience
    until: int  # first step that is not committed

    def make(self, plan, settings, *, step, first_sample, positions):
        source = self.recorded if step < self.until else self.live
        return source.make(
            plan, settings, step=step, first_sample=first_sample, positions=positions
        )


def dropped(pools: Sequence[CandidatePool]) -> dict[str, int]:
    """Candidates that left their pools before judging, in all and by reason."""
    reasons = [candidate.guard for pool in pools for candidate in pool.guarded]
    return {"dropped": len(reasons)} | {f"dropped_{r}": reasons.count(r) for r in GUARDS}


def rollout_means(rollouts: Sequence[Sequence[Candidate]]) -> Means:
    """Lengths of this replica's rollouts."""
    lengths = [len(c.token_ids) for of_sample in rollouts for c in of_sample]
    if not lengths:
        return {}
    return {"rollout/length": (float(sum(lengths)), float(len(lengths)))}


def pool_means(records: Sequence[PoolRecord]) -> Means:
    """What the pools say: who was chosen, by chance and in fact, rewards, wins, dead pools."""
    means: dict[str, list[float]] = {}

    def add(name: str, value: float, count: float = 1.0) -> None:
        entry = means.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += count

    for record in records:
        candidates = record.pool.candidates
        for pick in record.picks:
            if pick.candidate < 0 and pick.weight > 0:
                continue  # suffix or prefix, trained on beside the pool
            add("pool/skipped", float(pick.weight == 0))
            if pick.weight > 0 and record.rewards.valid[pick.candidate]:
                stopped = not record.rewards.passes[pick.candidate]
                name = "rejected" if _is_lowered(pick) or stopped else "chosen"
                add(f"reward/{name}", float(record.rewards.total[pick.candidate]))
        if record.rewards.passes.any():
            totals = np.where(record.rewards.passes, record.rewards.total, -np.inf)
            best = candidates[int(totals.argmax())]
            add("pool/rollout_chosen_rate", float(best.source == "rollout"))
            add("pool/rollout_chance_rate", record.pool.chance_rollout)
        add("pool/rollout_win_rate", *rollout_wins(record.pool, record.rewards))
        add("judge/vote_agreement", *vote_agreement(record.verdicts))
        for criterion in record.rewards.by_criterion:
            mine = [v for v in record.verdicts if v.criterion == criterion]
            add("judge/order_consistency", *order_consistency(mine))
        for criterion, scores in record.rewards.by_criterion.items():
            known = scores[~np.isnan(scores)]
            add(f"reward/{criterion}", float(known.sum()), len(known))
    return {name: (value, count) for name, (value, count) in means.items()}


def _is_lowered(pick: Pick) -> bool:
    """Whether training makes the candidate less likely."""
    return pick.role == "rejected" or (pick.role == "sample" and pick.advantage < 0)
