"""dpo, dpo_rewrite and simpo: who is paired, margins, the formula on pools some of which are dead.
"""  # fmt: skip

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from objective_helpers import (
    A,
    B,
    example,
    loss_of,
    metrics_of,
    picks_for,
    some_logprobs,
    some_pools,
    some_rows,
    terms_of,
    tokens_of,
)
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.config_objective import (
    DpoObjective,
    DpoRewriteObjective,
    RfNllObjective,
    SimpoObjective,
)
from megatron_sip.types import Pick

NAN = float("nan")
DPO = DpoObjective(name="dpo", beta=0.7)
MEAN = DpoObjective(name="dpo", beta=0.7, logprobs="mean")
REWRITE = DpoRewriteObjective(name="dpo_rewrite", beta=0.7)
SIMPO = SimpoObjective(name="simpo")
WIDTHS = [3, 4, 3, 4, 3]  # prefix lengths of `some_pools`
LIVE = {0: (2, 4), 4: (3, 1)}  # live pool: tokens of its chosen, of its rejected


def weights(picks: tuple[Pick, ...]) -> list[float]:
    return [p.weight for p in picks]


def test_metrics_of_the_example_by_hand() -> None:
    found = metrics_of(terms_of(*example(DpoObjective(name="dpo")), DpoObjective(name="dpo")))
    # chosen -3 + 4 = 1, rejected -4 + 3.5 = -0.5
    assert found == {
        "objective/dpo": pytest.approx(math.log(1 + math.exp(-0.15))), "objective/margin": 1.5,
        "objective/margin_accuracy": 1.0, "objective/chosen_logratio": 1.0,
        "objective/rejected_logratio": -0.5,
    }  # fmt: skip
    found = metrics_of(terms_of(*example(SIMPO), SIMPO))
    assert found["objective/chosen_logprob"] == -1.5
    assert found["objective/rejected_logprob"] == -4.0 and found["objective/margin"] == 2.5


@pytest.mark.parametrize("settings", [DPO, MEAN, SIMPO], ids=str)
def test_loss_equals_the_formula_with_all_terms_beside(settings: Any) -> None:
    sides = {"suffix_weight": 0.5, "chosen_weight": 0.75, "prefix_weight": 0.25}
    settings = settings.model_copy(update=sides)
    rows = some_rows(settings)
    logprobs, reference = some_logprobs(rows), rows.reference_logprobs
    expected = torch.zeros((), dtype=torch.float64)
    for b, lengths in LIVE.items():  # rows of a pool: chosen, rejected, suffix
        scores = []
        for row, n in zip((3 * b, 3 * b + 1), lengths, strict=True):
            of_policy = tokens_of(logprobs, row, WIDTHS[b], n)
            against = 0 if settings is SIMPO or settings.name == "simpo" else 1
            gap = of_policy - against * tokens_of(reference, row, WIDTHS[b], n)
            whole = settings.name == "dpo" and settings.logprobs == "sum"
            scores.append(gap.sum() if whole else gap.mean())
        z = settings.beta * (scores[0] - scores[1]) - getattr(settings, "gamma", 0.0)
        expected = expected - torch.log(torch.sigmoid(z)) / 2
        chosen = tokens_of(logprobs, 3 * b, WIDTHS[b], lengths[0])
        expected = expected - 0.75 * chosen.sum() / 5  # 2 + 3 tokens are chosen
    for b, p in enumerate(WIDTHS):
        expected = expected - 0.5 * tokens_of(logprobs, 3 * b + 2, p, 3).sum() / 15
        expected = expected - 0.25 * logprobs[3 * b, : p - 1].sum() / sum(p - 1 for p in WIDTHS)
    torch.testing.assert_close(loss_of(logprobs, rows, settings), expected)


@pytest.mark.parametrize("settings", [DPO, MEAN, REWRITE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margin_is_zero_and_loss_ln_two_exactly_when_policy_equals_reference(
    settings: Any, dtype: torch.dtype
) -> None:
    rows = some_rows(settings)
    logprobs = some_logprobs(rows).to(dtype).float()  # as the seam hands them over
    rows = replace(rows, reference_logprobs=logprobs.clone(), weights=rows.weights.float())
    (term,) = terms_of(logprobs, rows, settings)
    live = int(term.count)
    assert live in (2, 5) and term.metrics["objective/margin"].tolist() == [0.0, live]
    assert term.sum.item() == live * torch.tensor(math.log(2)).item()


@pytest.mark.parametrize("settings", [DPO, MEAN, REWRITE, SIMPO], ids=str)
def test_swapping_chosen_and_rejected_negates_the_margin(settings: Any) -> None:
    rows = some_rows(settings)
    swapped = replace(rows, pairs=rows.pairs.flip(1))
    logprobs = some_logprobs(rows)
    there, back = (terms_of(logprobs, r, settings)[0] for r in (rows, swapped))
    margins = [t.metrics["objective/margin"] for t in (there, back)]
    assert margins[0][0] == -margins[1][0] != 0
    assert there.sum != back.sum


def test_slope_of_dpo_at_a_margin_is_minus_beta_sigmoid_of_minus_beta_margin() -> None:
    logprobs, rows = example(DpoObjective(name="dpo"))
    logprobs.requires_grad_()
    loss_of(logprobs, rows, DpoObjective(name="dpo")).backward()
    slope = 0.1 / (1 + math.exp(0.1 * 1.5))
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([0, -slope, -slope, 0])
    assert logprobs.grad[1].tolist() == pytest.approx([0, slope, 0, 0])


def test_simpo_needs_no_reference() -> None:
    rows = some_rows(SIMPO)
    logprobs = some_logprobs(rows)
    moved = replace(rows, reference_logprobs=rows.reference_logprobs - 5.0)
    assert loss_of(logprobs, rows, SIMPO) == loss_of(logprobs, moved, SIMPO)


@pytest.mark.parametrize("settings", [RfNllObjective(name="rf_nll"), DPO, SIMPO], ids=str)
def test_choice_follows_the_candidates_when_the_pool_is_shuffled(settings: Any) -> None:
    rng = np.random.default_rng(0)
    candidates = [candidate((i, i + 1), "rollout") for i in range(6)]
    totals = np.float32([0, 5, 2, NAN, 1, 3])
    chosen = set()
    for _ in range(20):
        order = rng.permutation(6)
        one = pool(sample(), *(candidates[i] for i in order))
        (found,) = picks_for([one], [rewards(totals[order])], settings)
        chosen.add(tuple((p.role, int(order[p.candidate])) for p in found if p.candidate >= 0))
    expected = (("target", 1),) if settings.name == "rf_nll" else (("chosen", 1), ("rejected", 0))
    assert chosen == {expected}


def test_pools_without_contrast_are_dead() -> None:
    pools, found = some_pools()
    for settings in (DPO, SIMPO):
        dead = [weights(of_pool) for of_pool in picks_for(pools, found, settings)]
        assert dead == [[1, 1], [0, 0], [0, 0], [0, 0], [1, 1]]


def test_second_pair_is_second_best_with_second_worst_and_dead_when_there_are_too_few() -> None:
    settings = DpoObjective(name="dpo", pairs_per_pool=2)
    one = pool(sample(), *(candidate((i,)) for i in range(4)))
    (found,) = picks_for([one], [rewards([3, 0, 2, 1])], settings)
    assert [(p.candidate, p.role, p.weight) for p in found] == [
        (0, "chosen", 1.0), (1, "rejected", 1.0), (2, "chosen", 1.0), (3, "rejected", 1.0),
    ]  # fmt: skip
    (found,) = picks_for([one], [rewards([3, 0, 2, NAN])], settings)
    assert weights(found) == [1, 1, 0, 0]
    (found,) = picks_for([one], [rewards([3, 0, 1, 1])], settings)
    assert weights(found) == [1, 1, 0, 0]  # the second pair is a tie


def test_pairs_come_from_the_allowed_sources_only() -> None:
    one = pool(
        sample(), candidate((1,), "suffix"), candidate((2,)), candidate((3,)),
        candidate((4,), "rewrite"),
    )  # fmt: skip
    for name, kind in (("dpo", DpoObjective), ("simpo", SimpoObjective)):
        settings = kind(name=name, pair_sources=("rollout",))
        (found,) = picks_for([one], [rewards([9, 1, 2, -9])], settings)
        assert [(p.candidate, p.weight) for p in found] == [(2, 1.0), (1, 1.0)]


def test_rewrite_is_preferred_to_a_rollout_whatever_the_rewards() -> None:
    one = pool(
        sample(), candidate(A, "suffix"), candidate(B), candidate(A), candidate(B, "rewrite")
    )
    chosen = set()
    for totals in ([1, 2, 3, -9], [NAN] * 4, [0.0] * 4):
        (found,) = picks_for([one], [rewards(totals)], REWRITE)
        assert [(p.role, p.weight) for p in found] == [("chosen", 1.0), ("rejected", 1.0)]
        assert found[0].candidate == 3
        chosen.add(found[1].candidate)
    assert len(chosen) == 1 and chosen <= {1, 2}


def test_rejected_rollout_is_drawn_by_seed_and_sample() -> None:
    drawn = []
    for sample_id in range(60):
        one = pool(sample(sample_id), candidate(B, "rewrite"), *(candidate((i,)) for i in range(3)))
        drawn.append(picks_for([one], [rewards([NAN] * 4)], REWRITE)[0][1].candidate)
    assert {drawn.count(i) > 10 for i in (1, 2, 3)} == {True}


def test_rewrite_has_as_many_pairs_as_asked_and_is_dead_without_itself_or_rollouts() -> None:
    settings = DpoRewriteObjective(name="dpo_rewrite", pairs_per_pool=3)
    rollouts = [candidate((i,)) for i in range(2)]
    one = pool(sample(), candidate(B, "rewrite"), *rollouts)
    (found,) = picks_for([one], [rewards([NAN] * 3)], settings)
    assert weights(found) == [1, 1, 1, 1, 0, 0]
    assert {p.candidate for p in found if p.role == "rejected" and p.weight} == {1, 2}
    for rest in (rollouts, [candidate(B, "rewrite")]):
        (found,) = picks_for([pool(sample(), *rest)], [rewards([NAN] * len(rest))], settings)
        assert weights(found) == [0.0] * 6
