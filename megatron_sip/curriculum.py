"""Which sources, how many rollouts and which objective the next step uses. Pure.

`emergent` is the paper: all sources from the first step, the judge's choice does the mixing.
`staged` spends a token budget on nll, then rf_nll over suffix, rewrite and a few rollouts, then
the recipe's objective once the smoothed win rate of rollouts over the suffix allows it; it falls
back below a lower threshold (hysteresis) and never moves before a minimum of steps.
"""

from __future__ import annotations

from megatron_sip.config import Config, EmergentCurriculum, StagedCurriculum
from megatron_sip.config_objective import (
    NllObjective,
    Objective,
    ObjectiveSection,
    RfNllObjective,
)
from megatron_sip.types import Plan, Source

ORDER: tuple[Source, ...] = ("suffix", "rewrite", "rollout")
STAGES = ("nll", "rf_nll", "final")
START = {"stage": 0.0, "stage_steps": 0.0, "win_rate": 0.0, "suffix_tokens": 0.0}


def initial_stats(curriculum: EmergentCurriculum | StagedCurriculum) -> dict[str, float]:
    """Statistics before the first step; saved with every checkpoint."""
    final = isinstance(curriculum, EmergentCurriculum)
    return START | {"stage": 2.0 if final else 0.0}


def plan(config: Config, stats: dict[str, float]) -> Plan:
    """Plan of the next step."""
    assert config.curriculum is not None and config.rollout is not None
    stage = STAGES[int(stats["stage"])]
    if stage == "final":
        sources = config.curriculum.sources
        k = config.rollout.num_rollouts if "rollout" in sources else 0
        return Plan(stage, sources, k, config.objective.name)
    assert isinstance(config.curriculum, StagedCurriculum)
    if stage == "nll":
        return Plan(stage, ("suffix",), 0, "nll")
    sources: tuple[Source, ...] = tuple(s for s in ORDER if s in config.curriculum.sources)
    return Plan(stage, sources, config.curriculum.rf_nll_rollouts, "rf_nll")


def settings_of(config: Config, step_plan: Plan) -> Objective:
    """Settings of the planned objective; early stages keep what the recipe's has in common."""
    if step_plan.stage == "final":
        return config.objective
    early = NllObjective(name="nll")
    if step_plan.objective == "rf_nll":
        early = RfNllObjective(name="rf_nll")
    kept = {key: getattr(config.objective, key) for key in ObjectiveSection.model_fields}
    return early.model_copy(update=kept)


def update(
    curriculum: EmergentCurriculum | StagedCurriculum,
    stats: dict[str, float],
    *,
    win_rate: float | None,
    suffix_tokens: int,
) -> dict[str, float]:
    """Statistics after a committed step.

    Args: win_rate: rollouts over suffix in this step over all ranks, None where not compared.
          suffix_tokens: target tokens trained on over all ranks.
    """
    new = dict(stats)
    new["stage_steps"] += 1
    new["suffix_tokens"] += suffix_tokens
    if isinstance(curriculum, EmergentCurriculum):
        return new
    if win_rate is not None:
        a = curriculum.smoothing if new["win_rate"] else 1.0
        new["win_rate"] += a * (win_rate - new["win_rate"])
    stage = int(new["stage"])
    if stage == 0:
        move = new["suffix_tokens"] >= curriculum.nll_tokens
    elif new["stage_steps"] < curriculum.min_stage_steps:
        move = 0
    elif stage == 1:
        move = new["win_rate"] >= curriculum.promote_win_rate
    else:
        move = -(new["win_rate"] < curriculum.demote_win_rate)
    if move:
        new["stage"] = float(stage + int(move))
        new["stage_steps"] = 0.0
    return new
