"""What a step's pools say: who was chosen, at what reward, what was left out; and who is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.config_judge import Guards
from megatron_sip.config_objective import (
    DpoObjective,
    DpoRewriteObjective,
    GrpoObjective,
    NllObjective,
    RfNllObjective,
    SftRewriteObjective,
)
from megatron_sip.data.sample_reader import SampleReader
from megatron_sip.experience import LiveExperience, pool_means
from megatron_sip.metrics import PhaseTimer, reduce_means
from megatron_sip.objectives import picks_of
from megatron_sip.pool_store import PoolRecord
from megatron_sip.types import Plan

NAN = float("nan")
ONE = pool(
    sample(), candidate((1,), "suffix"), candidate((2,)), candidate((3,)), candidate((4,)),
    candidate((5,), "rewrite"),
)  # fmt: skip


def means_of(settings: Any, *totals: list[float]) -> dict[str, float]:
    found = [rewards(t) for t in totals]
    picks = picks_of([ONE] * len(found), found, settings, seed=1)
    records = [
        PoolRecord(0, i, ONE, r, (), p) for i, (r, p) in enumerate(zip(found, picks, strict=True))
    ]
    return reduce_means([pool_means(records)])


def test_samples_above_the_mean_are_chosen_and_those_below_rejected() -> None:
    found = means_of(GrpoObjective(name="grpo"), [9, 1, 3, NAN, 9], [9, 2, 2, 2, 9])
    assert found["reward/chosen"] == 3.0 and found["reward/rejected"] == 1.0
    assert found["pool/skipped"] == pytest.approx(4 / 6)  # one invalid, three of one reward


def test_pool_without_a_target_is_skipped_and_the_suffix_beside_is_not_counted() -> None:
    found = means_of(RfNllObjective(name="rf_nll"), [NAN] * 5, [1, 2, 3, 4, 0])
    assert found["pool/skipped"] == 0.5 and found["reward/chosen"] == 4.0
    beside = DpoObjective(name="dpo", suffix_weight=1.0, prefix_weight=1.0)
    assert means_of(beside, [NAN] * 5)["pool/skipped"] == 1.0


def test_pools_that_nobody_judged_have_no_reward() -> None:
    found = means_of(DpoRewriteObjective(name="dpo_rewrite"), [NAN] * 5)
    assert found == {"pool/skipped": 0.0}


class Judge:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def judge_pools(self, pools: Any, *, seed: int) -> Any:
        self.calls += 1
        found = [rewards(list(range(len(p.candidates)))) for p in pools]
        return found, [()] * len(pools), {"verdicts": 1.0}


def experience(judge: Judge) -> LiveExperience:
    rewritten = candidate((7, 7), "rewrite")
    return LiveExperience(
        reader=SampleReader([sample(i) for i in range(4)], batch=4, steps=0),
        tokenizer=SimpleNamespace(continuation_text=lambda *_: ("p", "s")),  # pyright: ignore
        engine=SimpleNamespace(  # pyright: ignore[reportArgumentType]
            generate=lambda samples, k, **_: [[candidate((i,)) for i in range(k)] for _ in samples],
            seconds={},
        ),
        judge=judge,  # pyright: ignore[reportArgumentType]
        rewriter=SimpleNamespace(  # pyright: ignore[reportArgumentType]
            rewrite=lambda samples, **_: ([rewritten for _ in samples], {})
        ),
        timer=PhaseTimer(), seed=1, min_candidate_tokens=1, guards=Guards(), dp_size=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        (NllObjective(name="nll"), 0),
        (SftRewriteObjective(name="sft_rewrite"), 0),
        (DpoRewriteObjective(name="dpo_rewrite"), 0),
        (RfNllObjective(name="rf_nll"), 1),
        (DpoObjective(name="dpo"), 1),
        (GrpoObjective(name="grpo"), 1),
    ],
    ids=str,
)
def test_no_question_is_paid_for_an_objective_that_heeds_no_reward(
    settings: Any, calls: int
) -> None:
    judge = Judge()
    plan = Plan("final", ("suffix", "rewrite", "rollout"), 3, settings.name)
    records, means = experience(judge).make(
        plan, settings, step=0, first_sample=0, positions=np.arange(4)
    )
    assert judge.calls == calls and ("judge/verdicts" in means) == bool(calls)
    assert all(p.weight == 1 for r in records for p in r.picks)
    assert all(r.rewards.valid.all() == bool(calls) for r in records)
