"""Verdict forms asked of a real server, the staged curriculum, and a sync now and then."""

import json
import math
import re

import numpy as np
import pytest
from tiny_run import SIP, make_judge

from megatron_sip.pool_store import read_pools

STEPS = 5
CRITERIA = [
    {"form": "pairwise", "name": "quality", "server": "judge", "prompt": "quality_pairwise_v2"},
    {"form": "pointwise", "name": "safety", "server": "judge", "prompt": "safety_pointwise_v2"},
    {"form": "novelty", "name": "novelty", "weight": 0.1},
]
STAGED = {
    "kind": "staged",
    "sources": ["suffix", "rewrite", "rollout"],
    "nll_tokens": 64,  # one step: 4 suffixes of 16 tokens
    "promote_win_rate": 0.01,
    "demote_win_rate": 0.0,
    "smoothing": 1.0,
    "min_stage_steps": 1,
}


@pytest.fixture(scope="module")
def staged(workplace, launch, pretrained):
    """Five steps with two syncs, judged by label-token probabilities."""
    recipe = workplace.recipe(
        SIP,
        "staged",
        model__init={"kind": "megatron", "path": str(pretrained.run_dir)},
        run__steps=STEPS,
        curriculum=STAGED,
        judge__criteria=CRITERIA,
        judge__both_orders=0.0,  # this judge answers a position as much as a text
        judge__trust={"interval": 2, "num_canaries": 3, "min_accuracy": 0.0},
        rollout__sync_interval=2,
        servers__judge__model=str(
            make_judge(workplace.folder / "label-judge", labels=("1", "2", "Yes", "No"))
        ),
    )
    run = launch(recipe).wait()
    assert run.process.returncode == 0, run.stderr()
    return run


def records(run, step):
    return read_pools(run.run_dir / "pools", step, dp_rank=0, dp_size=1)


def test_each_stage_brings_its_sources_and_its_objective(staged):
    after = [line["curriculum/stage"] for line in staged.metrics()]
    stages = [0, *after[:-1]]  # a line says the stage of the next step
    assert stages == [0, 1, 2, 2, 2]
    for step, (stage, line) in enumerate(zip(stages, staged.metrics(), strict=True)):
        sources = [c.source for c in records(staged, step)[0].pool.candidates]
        assert sources.count("rollout") == {0: 0, 1: 1, 2: 3}[stage]
        assert ("objective/dpo" in line) == (stage == 2)
        assert ("objective/nll" in line) == (stage < 2)
    first_dpo = staged.metrics()[2]  # the reference is taken here, after two steps of learning
    assert first_dpo["objective/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert first_dpo["objective/margin"] == 0.0


def test_verdicts_of_a_real_server_are_probabilities_that_hang_on_the_text(staged):
    final = records(staged, STEPS - 1)
    for name in ("quality", "safety"):
        scores = np.concatenate([r.rewards.by_criterion[name] for r in final])
        assert ((scores >= 0) & (scores <= 1)).all() and len(set(scores)) > len(scores) // 2
    for record in final:
        count = len(record.pool.candidates)
        asked = [v.criterion for v in record.verdicts]
        assert asked.count("quality") == count * (count - 1) // 2
        assert asked.count("safety") == asked.count("novelty") == count
        assert record.rewards.by_criterion["quality"].sum() == pytest.approx(count / 2, abs=1e-5)
        assert (record.rewards.by_criterion["novelty"] > 0).all()
        assert record.rewards.num_missing == 0


def test_judges_are_looked_at_every_other_step(staged):
    for step, line in enumerate(staged.metrics()):
        for name in ("accuracy/quality", "master_keys/quality", "consistency/quality"):
            assert (f"judge/canary_{name}" in line) == (step % 2 == 0)
            assert 0 <= line.get(f"judge/canary_{name}", 0) <= 1
        assert ("judge/canary_accuracy/safety" in line) == (step % 2 == 0)
        if line.get("judge/verdicts"):
            assert line["judge/paid"] > 0 and line["judge/prompt_tokens"] > 100
            assert line["judge/spent_questions"] >= line["judge/paid"]


def test_rollouts_are_of_the_version_synced_last_and_the_end_policy_is_evaluated(staged):
    lines = staged.metrics()
    for step, line in enumerate(lines):
        rollouts = [
            c for r in records(staged, step) for c in r.pool.candidates if c.source == "rollout"
        ]
        assert {c.policy_version for c in rollouts} <= {step - step % 2}
        assert line["policy/version"] == step + 1
    assert lines[-1]["policy/lag"] == 0 and lines[3]["policy/lag"] == 1
    summary = json.loads((staged.run_dir / "summary.json").read_text())
    assert summary["policy_version"] == STEPS and summary["eval"]["unscored"] == 0
    log = (staged.run_dir / "logs" / "trainer.log").read_text()
    served = [int(n) for n in re.findall(r"policy version (\d+) is served", log)]
    assert served == [0, 2, 4, STEPS]
