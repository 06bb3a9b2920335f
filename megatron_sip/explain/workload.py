"""What one step of a curriculum stage asks for: pools, rollouts, verdicts, rows. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_sip import curriculum
from megatron_sip.config import Config
from megatron_sip.config_judge import NoveltyCriterion
from megatron_sip.config_objective import (
    GrpoObjective,
    Objective,
    PairObjective,
    needs_rewards,
    reference_kind,
)
from megatron_sip.judge.schedules import next_questions
from megatron_sip.platform import Platform
from megatron_sip.rows import round_up, row_length
from megatron_sip.types import Plan, Verdict


@dataclass(frozen=True)
class Workload:
    """One step over all ranks."""

    stage: str
    objective: str
    sources: tuple[str, ...]
    prompts: int
    rollouts: int
    rewrites: int
    candidates: int
    """Of one pool, if none is dropped."""
    verdicts: dict[str, int]
    """By criterion; "novelty" ones are computed and ask no server. All 0 where no reward counts."""
    rows: int
    row_length: int
    """Positions of a row, when every prefix and candidate is as long as it may be."""
    row_multiple: int
    """Row lengths are rounded up to it (FP8 tiles, sequence-parallel slices)."""
    rows_per_micro_batch: int
    micro_batches: int
    """Of one data-parallel rank."""
    uses_reference: bool
    """Whether a forward pass of a reference model is made."""

    @property
    def row_tokens(self) -> int:
        """Positions that the trainer computes, padding included."""
        return self.rows * self.row_length


def plans(config: Config) -> tuple[Plan, ...]:
    """The plan of each stage that the run may be in."""
    if config.curriculum is None:
        return (Plan("final", ("suffix",), 0, config.objective.name),)
    last = len(curriculum.STAGES) - 1
    stages = range(last + 1) if config.curriculum.kind == "staged" else (last,)
    return tuple(curriculum.plan(config, curriculum.START | {"stage": float(i)}) for i in stages)


def workload(config: Config, plan: Plan, platform: Platform) -> Workload:
    """Work of one step under `plan`."""
    data, parallel = config.data, config.parallel
    settings = curriculum.settings_of(config, plan)
    multiple = platform.token_multiple(
        tensor_parallel=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )
    rollouts = plan.num_rollouts if "rollout" in plan.sources else 0
    singles = sum(source in plan.sources for source in ("suffix", "rewrite"))
    candidates = rollouts + singles if config.judge else 0
    prompts, branches = data.global_batch_size, rows_per_pool(settings, rollouts)
    per_pool, length = branches, row_length(data.prefix_tokens, data.suffix_tokens, multiple)
    if settings.row_layout == "shared_prefix":
        length = round_up(data.prefix_tokens - 1 + branches * data.suffix_tokens, multiple)
        per_pool = 1
    judged = candidates if needs_rewards(settings) else 0
    return Workload(
        stage=plan.stage,
        objective=plan.objective,
        sources=tuple(plan.sources),
        prompts=prompts,
        rollouts=prompts * rollouts,
        rewrites=prompts * ("rewrite" in plan.sources),
        candidates=candidates,
        verdicts={n: prompts * k for n, k in verdicts_per_pool(config, judged).items()},
        rows=prompts * per_pool,
        row_length=length,
        row_multiple=multiple,
        rows_per_micro_batch=data.micro_batch_size * per_pool,
        micro_batches=prompts // (data.micro_batch_size * parallel.data_parallel_size),
        uses_reference=reference_kind(config.reference, settings) in ("frozen", "snapshot"),
    )


def rows_per_pool(settings: Objective, num_rollouts: int) -> int:
    """Candidates that an objective trains on in one pool: padded rows, or branches of one row. A
    prefix that is trained on needs none of its own.

    Args: num_rollouts: K, if none is dropped.
    """
    if isinstance(settings, PairObjective):
        return 2 * settings.pairs_per_pool + (settings.suffix_weight > 0)
    if isinstance(settings, GrpoObjective):
        return num_rollouts + (settings.suffix_weight > 0)
    return 1


def verdicts_per_pool(config: Config, candidates: int) -> dict[str, int]:
    """Verdicts on one pool by criterion, counted on the schedule's own questions; where these
    depend on the verdicts, on those of a judge that sees ties."""
    if config.judge is None:
        return {}
    judge = config.judge
    asked = [c for c in judge.criteria if not isinstance(c, NoveltyCriterion)]
    ties: list[Verdict] = []
    while questions := next_questions(
        judge.schedule, ties, candidates, 0, criteria=asked, both_orders=judge.both_orders
    ):
        ties += [
            Verdict(q.criterion, q.candidate, q.opponent, q.vote, 0.5, "", q.candidate_first)
            for q in questions
        ]
    found = Counter(v.criterion for v in ties)
    return {
        c.name: candidates if c.form == "novelty" else found[c.name] for c in config.judge.criteria
    }
