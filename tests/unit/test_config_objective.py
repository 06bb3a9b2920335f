"""Objectives and references: what contradicts is refused, what fits is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter
from test_config import REWRITER, SIP, refusal

from megatron_sip.config_objective import (
    Objective,
    needs_reference,
    needs_rewards,
    reference_kind,
)
from megatron_sip.recipe import load_config

ALL = 'curriculum.sources=["suffix", "rewrite", "rollout"]'
GRPO = 'objective={ name = "grpo" }'
KL = 'objective={ name = "grpo", kl_weight = 0.1 }'
REWRITE = 'objective={ name = "dpo_rewrite" }'
SIMPO = 'objective={ name = "simpo", pair_sources = ["rollout"] }'
ENGINE = 'reference={ kind = "rollout" }'
FROZEN = 'reference={ kind = "frozen" }'
SNAPSHOT = 'reference={ kind = "snapshot", interval = 5 }'


@pytest.fixture
def sip(tmp_path: Path) -> Path:
    path = tmp_path / "sip.toml"
    path.write_text(SIP)
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        [GRPO], [KL], [KL, ENGINE], [KL, SNAPSHOT], [SIMPO], [REWRITE, ALL, REWRITER],
        [REWRITE, ALL, REWRITER, SNAPSHOT], ['objective={ name = "sft_rewrite" }', ALL, REWRITER],
        ['objective={ name = "rf_nll" }'], [ENGINE], [FROZEN], [SNAPSHOT],
        ["optimizer.nonfinite=skip", "optimizer.max_skipped_steps=1", "rollout.max_kl=0.1"],
    ],
)  # fmt: skip
def test_what_fits_is_taken(sip: Path, overrides: list[str]) -> None:
    load_config(sip, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([GRPO, "rollout.temperature=0.7"],
         'rollout.temperature is 0.7, but objective.name "grpo" trains at temperature 1; set it '
         "to 1.0"),
        ([GRPO, "rollout.top_p=0.9"], "rollout.top_p is 0.9, but objective.name"),
        ([GRPO, "rollout.num_rollouts=1"], "rollout.num_rollouts is 1, but objective.name"),
        ([GRPO, 'curriculum.sources=["suffix"]'], 'has no "rollout"; add it'),
        ([REWRITE], 'curriculum.sources (\'suffix\', \'rollout\') has no "rewrite"; add it'),
        ([REWRITE, 'curriculum.sources=["suffix", "rewrite"]', REWRITER], 'has no "rollout"'),
        (['objective={ name = "dpo_rewrite", pairs_per_pool = 5 }', ALL, REWRITER],
         "objective.pairs_per_pool 5 must not exceed rollout.num_rollouts 4"),
        (['objective={ name = "sft_rewrite" }'], 'has no "rewrite"; add it'),
        (['objective={ name = "simpo" }'], "pair_sources ('suffix', 'rewrite', 'rollout') must be"),
        ([SIMPO, FROZEN], '[reference] is "frozen", but objective.name "simpo" compares with none'),
        ([GRPO, SNAPSHOT], "with objective.kl_weight 0 compares with none"),
        ([ENGINE, 'objective.pair_sources=["suffix", "rollout"]'], 'set it to ["rollout"]'),
        ([REWRITE, ALL, REWRITER, ENGINE], 'prefers the rewrite; set reference.kind to "frozen"'),
        (['reference={ kind = "snapshot" }'], "interval: required and missing"),
        (["optimizer.nonfinite=ignore"], "optimizer.nonfinite is 'ignore'"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused_with_key_value_rule_and_remedy(
    sip: Path, overrides: list[str], message: str
) -> None:
    assert message in refusal(sip, *overrides)


@pytest.mark.parametrize(
    ("name", "rewards", "reference"),
    [
        ("nll", False, "none"), ("sft_rewrite", False, "none"), ("rf_nll", True, "none"),
        ("dpo", True, "frozen"), ("dpo_rewrite", False, "frozen"), ("simpo", True, "none"),
        ("grpo", True, "none"),
    ],
)  # fmt: skip
def test_what_each_objective_needs(name: str, rewards: bool, reference: str) -> None:
    objective: Objective = TypeAdapter(Objective).validate_python({"name": name})
    assert needs_rewards(objective) == rewards
    assert reference_kind(None, objective) == reference
    assert needs_reference(objective) == (reference != "none")


def test_grpo_compares_with_a_reference_where_the_kl_has_a_weight() -> None:
    objective: Objective = TypeAdapter(Objective).validate_python(
        {"name": "grpo", "kl_weight": 0.1}
    )
    assert needs_reference(objective) and reference_kind(None, objective) == "frozen"


def test_saved_recipe_says_of_the_reference_what_was_said(sip: Path, tmp_path: Path) -> None:
    for overrides in ([], [SNAPSHOT], [GRPO]):
        config = load_config(sip, overrides)
        dumped = config.model_dump(mode="json", exclude_none=True)
        assert ("reference" in dumped) == (overrides == [SNAPSHOT])
        assert type(config).model_validate_json(config.model_dump_json(exclude_none=True)) == config
