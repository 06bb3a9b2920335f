"""Curriculum: stages move by budget and win rate, with hysteresis and a minimum of steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_sip import curriculum
from megatron_sip.config import EmergentCurriculum, StagedCurriculum
from megatron_sip.config_objective import DpoObjective

SOURCES = ("suffix", "rewrite", "rollout")
STAGED = StagedCurriculum(
    kind="staged", sources=SOURCES, nll_tokens=100, rf_nll_rollouts=2, promote_win_rate=0.4,
    demote_win_rate=0.2, smoothing=0.5, min_stage_steps=3,
)  # fmt: skip
EMERGENT = EmergentCurriculum(kind="emergent", sources=SOURCES)
DPO = DpoObjective(name="dpo", prefix_weight=0.3)


def recipe(kind: Any) -> Any:
    return SimpleNamespace(curriculum=kind, rollout=SimpleNamespace(num_rollouts=8), objective=DPO)


def after(stats: dict[str, float], *win_rates: float | None) -> dict[str, float]:
    for win_rate in win_rates:
        stats = curriculum.update(STAGED, stats, win_rate=win_rate, suffix_tokens=40)
    return stats


def at(stage: int, **stats: float) -> dict[str, float]:
    return curriculum.START | {"stage": float(stage)} | stats


def test_emergent_wants_everything_from_the_first_step_and_never_moves() -> None:
    stats = curriculum.initial_stats(EMERGENT)
    for _ in range(5):
        plan = curriculum.plan(recipe(EMERGENT), stats)
        assert (plan.stage, plan.sources, plan.num_rollouts) == ("final", SOURCES, 8)
        assert curriculum.settings_of(recipe(EMERGENT), plan) is DPO
        stats = curriculum.update(EMERGENT, stats, win_rate=0.0, suffix_tokens=40)
    assert stats["stage"] == 2 and stats["suffix_tokens"] == 200 and stats["stage_steps"] == 5


def test_no_rollouts_are_asked_for_where_the_recipe_has_none() -> None:
    only = EmergentCurriculum(kind="emergent", sources=("suffix", "rewrite"))
    assert curriculum.plan(recipe(only), curriculum.initial_stats(only)).num_rollouts == 0


def test_staged_plans_name_sources_rollouts_and_objective() -> None:
    config = recipe(STAGED)
    plans = [curriculum.plan(config, at(stage)) for stage in range(3)]
    assert [p.objective for p in plans] == ["nll", "rf_nll", "dpo"]
    assert [p.num_rollouts for p in plans] == [0, 2, 8]
    assert [p.sources for p in plans] == [("suffix",), SOURCES, SOURCES]
    settings = [curriculum.settings_of(config, p) for p in plans]
    assert [s.name for s in settings] == ["nll", "rf_nll", "dpo"]
    assert [s.prefix_weight for s in settings] == [0.3, 0.3, 0.3]


def test_early_stages_keep_what_all_objectives_have() -> None:
    config = recipe(STAGED)
    config.objective = DPO.model_copy(update={"row_layout": "shared_prefix"})
    plans = [curriculum.plan(config, at(stage)) for stage in range(3)]
    assert [curriculum.settings_of(config, p).row_layout for p in plans] == ["shared_prefix"] * 3


def test_nll_ends_with_its_token_budget_and_not_before() -> None:
    stats = after(curriculum.initial_stats(STAGED), None, None)
    assert stats["stage"] == 0 and stats["suffix_tokens"] == 80
    stats = after(stats, None)
    assert stats["stage"] == 1 and stats["stage_steps"] == 0


def test_promotion_waits_for_the_minimum_of_steps() -> None:
    stats = after(at(1), 1.0, 1.0)
    assert stats["stage"] == 1
    assert after(stats, 1.0)["stage"] == 2


def test_promotion_needs_the_smoothed_rate_not_one_lucky_step() -> None:
    stats = after(at(1), 0.1, 0.1, 0.1, 0.5)
    assert abs(stats["win_rate"] - 0.3) < 1e-12 and stats["stage"] == 1
    assert after(stats, 0.5)["stage"] == 2  # 0.4 reaches the threshold


def test_demotion_is_below_the_lower_threshold_after_the_minimum_of_steps() -> None:
    held = after(at(2, win_rate=0.4), 0.25, 0.25, 0.25, 0.25, 0.25)
    assert held["stage"] == 2  # between the thresholds: hysteresis
    early = after(at(2, win_rate=0.4), 0.01, 0.01)
    assert early["stage"] == 2
    late = after(early, 0.01)
    assert late["stage"] == 1 and late["stage_steps"] == 0


def test_first_rate_is_taken_whole_and_a_step_without_comparison_leaves_it() -> None:
    stats = after(at(1), 0.3)
    assert stats["win_rate"] == 0.3
    assert after(stats, None)["win_rate"] == 0.3


def test_update_leaves_its_argument_alone() -> None:
    stats = at(0)
    after(stats, 0.9)
    assert stats == at(0)
