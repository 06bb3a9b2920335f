"""GRPO: advantages over valid rollouts alone, the clipped ratio, the KL, dead groups."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from objective_helpers import (
    example,
    loss_of,
    metrics_of,
    picks_for,
    rows_of,
    some_logprobs,
    some_rows,
    terms_of,
)
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.config_objective import GrpoObjective
from megatron_sip.objectives.grpo import advantages_of
from megatron_sip.rows import make_rows
from megatron_sip.types import Pick

NAN = float("nan")
GRPO = GrpoObjective(name="grpo")
KL = GrpoObjective(name="grpo", kl_weight=1.0)


def samples(picks: tuple[Pick, ...]) -> list[tuple[int, float, float]]:
    return [(p.candidate, p.advantage, p.weight) for p in picks if p.role == "sample"]


def test_advantages_by_hand() -> None:
    rewards_G = np.float32([1, 2, 3, 6])  # mean 3, population variance (4 + 1 + 0 + 9) / 4
    found = advantages_of(rewards_G, GRPO)
    assert found == pytest.approx(np.array([-2, -1, 0, 3]) / (math.sqrt(3.5) + 1e-6), rel=1e-12)
    centered = advantages_of(rewards_G, GrpoObjective(name="grpo", advantage="centered"))
    assert centered == pytest.approx([-2, -1, 0, 3])
    assert advantages_of(np.float32([5, 4]), GRPO) == pytest.approx([1, -1], rel=1e-5)


@pytest.mark.parametrize("totals", [[], [3.0], [0.1, 0.1, 0.1]])
def test_group_without_contrast_has_no_advantages(totals: list[float]) -> None:
    assert advantages_of(np.float32(totals), GRPO) is None


def test_only_valid_rollouts_are_in_the_mean_and_only_rollouts_are_samples() -> None:
    one = pool(
        sample(), candidate((1,), "suffix"), candidate((2,)), candidate((3,)), candidate((4,)),
        candidate((5,), "rewrite"),
    )  # fmt: skip
    (found,) = picks_for([one], [rewards([99, 2, NAN, 4, -99])], GRPO)
    assert [p.role for p in found] == ["sample"] * 3
    assert samples(found) == [
        (1, pytest.approx(-1, rel=1e-5), 1.0), (2, 0.0, 0.0), (3, pytest.approx(1, rel=1e-5), 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("totals", [[1, 1, 1], [NAN, NAN, 1], [NAN] * 3, [NAN, 2, 2]])
def test_group_without_contrast_keeps_its_rows_at_weight_and_advantage_zero(
    totals: list[float],
) -> None:
    one = pool(sample(), *(candidate((i, i)) for i in range(3)))
    (found,) = picks_for([one], [rewards(totals)], GRPO)
    assert samples(found) == [(i, 0.0, 0.0) for i in range(3)]


def test_equal_rewards_give_exactly_no_gradient() -> None:
    pools = [pool(sample(i), *(candidate((j, j)) for j in range(3))) for i in range(2)]
    rows = rows_of(KL, pools, [rewards([0.1] * 3)] * 2)
    logprobs = some_logprobs(rows).requires_grad_()
    found = loss_of(logprobs, rows, KL)
    found.backward()
    assert found.item() == 0 and logprobs.grad is not None and (logprobs.grad == 0).all()


def test_pool_without_a_rollout_keeps_a_dead_row() -> None:
    one = pool(sample(), candidate((1, 2), "suffix"))
    (found,) = picks_for([one], [rewards([1])], GRPO)
    assert samples(found) == [(-2, 0.0, 0.0)]
    rows = make_rows([one], [found], length=6, pad=0)
    assert rows.tokens.shape == (1, 6)
    term = terms_of(some_logprobs(rows).float(), rows, GRPO)[0]
    assert (term.sum.item(), term.count.item()) == (0.0, 0)


def test_metrics_of_the_example_by_hand() -> None:
    found = metrics_of(terms_of(*example(KL), KL))
    assert found["objective/ratio"] == pytest.approx((1.5 + 1 + 0.5) / 3)
    assert found["objective/clip_fraction"] == pytest.approx(2 / 3)
    assert found["objective/grpo"] == pytest.approx(-0.15, rel=1e-5)
    k3 = math.exp(-0.5) + 0.5 - 1 + math.exp(0.5) - 0.5 - 1
    assert found["objective/kl_reference"] == pytest.approx(k3 / 2)


def test_gradient_of_the_example_by_hand() -> None:
    logprobs, rows = example(GRPO)
    logprobs.requires_grad_()
    loss_of(logprobs, rows, GRPO).backward()
    assert logprobs.grad is not None
    # A, advantage 1: 1.5 is clipped, 1 is not: -1/2 of a sample, -1/2 of a token; B is clipped
    assert logprobs.grad[0].tolist() == pytest.approx([0, 0, -0.25, 0], rel=1e-5)
    assert logprobs.grad[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 1.0, 1.2, 0.0),  # good and already likelier: no more
        (0.5, 1.0, 0.5, 0.5),  # good and less likely: pulled back
        (1.5, -1.0, -1.5, -1.5),  # bad and likelier: pushed down
        (0.5, -1.0, -0.8, 0.0),  # bad and already less likely: no more
    ],
)
def test_clipping_bounds_what_may_be_gained_only(
    ratio: float, advantage: float, value: float, slope: float
) -> None:
    logprobs, rows = example(GRPO)
    rows = replace(
        rows,
        rollout_logprobs=logprobs - math.log(ratio),
        advantages=torch.full_like(rows.advantages, advantage),
    )
    logprobs.requires_grad_()
    found = loss_of(logprobs, rows, GRPO)
    found.backward()
    assert found.item() == pytest.approx(-value)
    assert logprobs.grad is not None
    assert logprobs.grad[1, 1].item() == pytest.approx(-slope / 2)  # one of two samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_one_and_nothing_is_clipped_at_lag_zero(dtype: torch.dtype) -> None:
    rows = some_rows(GRPO)
    logprobs = some_logprobs(rows).to(dtype).float()
    rows = replace(rows, rollout_logprobs=logprobs.clone(), weights=rows.weights.float(),
                   advantages=rows.advantages.float())  # fmt: skip
    found = metrics_of(terms_of(logprobs, rows, GRPO))
    assert found["objective/ratio"] == 1.0 and found["objective/clip_fraction"] == 0.0


def test_kl_is_zero_exactly_with_no_gradient_where_policy_equals_reference() -> None:
    rows = some_rows(KL)
    logprobs = some_logprobs(rows).requires_grad_()
    rows = replace(rows, reference_logprobs=logprobs.detach().clone())
    term = terms_of(logprobs, rows, KL)[1]
    term.sum.backward()
    assert term.name == "kl_reference" and term.sum.item() == 0
    assert logprobs.grad is not None and (logprobs.grad == 0).all()


@pytest.mark.parametrize("divisor", [None, 8])
def test_loss_equals_the_formula(divisor: int | None) -> None:
    settings = GrpoObjective(name="grpo", kl_weight=0.3, token_divisor=divisor)
    pools = [
        pool(sample(b, range(1, 4)), *(candidate(range(9 * b, 9 * b + n)) for n in (2, 4, 1)))
        for b in range(2)
    ]
    totals = [[1.0, 4.0, 2.5], [0.5, NAN, 0.0]]
    rows = rows_of(settings, pools, [rewards(t) for t in totals])
    logprobs = some_logprobs(rows)
    expected, live = 0.0, 5
    for b, of_pool in enumerate(totals):
        there = np.array(of_pool)[~np.isnan(of_pool)]
        for g, (reward, n) in enumerate(zip(of_pool, (2, 4, 1), strict=True)):
            if math.isnan(reward):
                continue
            a = (reward - there.mean()) / (there.std() + 1e-6)
            for t in range(n):
                place = (3 * b + g, 2 + t)  # three prefix tokens
                pi, mu, ref = (
                    float(x[place])
                    for x in (logprobs, rows.rollout_logprobs, rows.reference_logprobs)
                )
                rho = math.exp(pi - mu)
                gain = min(rho * a, min(max(rho, 0.8), 1.2) * a)
                kl = math.exp(ref - pi) - (ref - pi) - 1
                expected += (-gain + 0.3 * kl) / (divisor or n) / live
    assert loss_of(logprobs, rows, settings).item() == pytest.approx(expected, rel=1e-6)


def test_suffix_and_prefix_are_learned_beside_it_and_never_enter_the_ratio() -> None:
    settings: Any = GrpoObjective(name="grpo", suffix_weight=0.5, prefix_weight=0.25)
    rows = some_rows(settings)
    logprobs = some_logprobs(rows)
    terms = terms_of(logprobs, rows, settings)
    assert [t.name for t in terms] == ["grpo", "suffix_nll", "prefix_nll"]
    moved = logprobs.clone()
    others = torch.tensor([r != 4 for r in rows.roles.tolist()] + [False])[rows.segment_ids.long()]
    moved[others] -= 1.0
    assert terms_of(moved, rows, settings)[0].sum == terms[0].sum
