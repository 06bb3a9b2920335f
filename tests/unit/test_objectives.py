"""What every objective keeps: the documented values, gradients, dead pools, terms; and the NLLs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objective_helpers import (
    example,
    live_labels,
    loss_of,
    picks_for,
    rows_of,
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
    GrpoObjective,
    NllObjective,
    RfNllObjective,
    SftRewriteObjective,
    SimpoObjective,
)
from megatron_sip.objectives import OBJECTIVES
from megatron_sip.objectives.terms import segment_lengths, segment_sums, total_loss
from megatron_sip.rows import make_rows

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
SIDES = {"suffix_weight": 0.5, "chosen_weight": 0.75, "prefix_weight": 0.25}
NLL = NllObjective(name="nll", prefix_weight=0.4)
RF_NLL = RfNllObjective(name="rf_nll", prefix_weight=0.4)
DPO = DpoObjective(name="dpo", beta=0.7, **SIDES)
GRPO = GrpoObjective(name="grpo", kl_weight=0.3, suffix_weight=0.5, prefix_weight=0.25)
ALL = [
    NLL,
    SftRewriteObjective(name="sft_rewrite", prefix_weight=0.4),
    RF_NLL,
    DPO,
    DpoObjective(name="dpo", beta=0.7, logprobs="mean", pairs_per_pool=2),
    DpoRewriteObjective(name="dpo_rewrite", beta=0.7, **SIDES),
    SimpoObjective(name="simpo", **SIDES),
    GRPO,
    GrpoObjective(name="grpo", advantage="centered", token_divisor=7, clip=0.5),
]
BARE = [
    RfNllObjective(name="rf_nll"),
    SftRewriteObjective(name="sft_rewrite"),
    DpoObjective(name="dpo"),
    DpoObjective(name="dpo", logprobs="mean"),
    DpoRewriteObjective(name="dpo_rewrite"),
    SimpoObjective(name="simpo"),
]
LN = math.log
GOLDEN = [  # the numbers of docs/objectives.md
    (NllObjective(name="nll"), (1 + 2) / 2, "1.5000"),
    (SftRewriteObjective(name="sft_rewrite"), 4.0, "4.0000"),
    (RfNllObjective(name="rf_nll"), (1 + 2) / 2, "1.5000"),
    (DpoObjective(name="dpo"), LN(1 + math.exp(-0.1 * 1.5)), "0.6210"),
    (DpoObjective(name="dpo", logprobs="mean"), LN(1 + math.exp(-0.1 * 1.0)), "0.6444"),
    (DpoRewriteObjective(name="dpo_rewrite"), LN(1 + math.exp(0.1 * 1.5)), "0.7710"),
    (SimpoObjective(name="simpo"), LN(1 + math.exp(-(2 * 2.5 - 0.5))), "0.0110"),
    (GrpoObjective(name="grpo"), -(1.1 - 0.8) / 2, "-0.1500"),
    (
        GrpoObjective(name="grpo", kl_weight=1.0),
        -0.15 + (math.exp(-0.5) + 0.5 - 1 + math.exp(0.5) - 0.5 - 1) / 2,
        "-0.0224",
    ),
    (DpoObjective(name="dpo", chosen_weight=1.0), LN(1 + math.exp(-0.15)) + 1.5, "2.1210"),
]


@pytest.mark.parametrize(("settings", "value", "printed"), GOLDEN, ids=str)
def test_documented_example_has_the_documented_value(
    settings: Any, value: float, printed: str
) -> None:
    logprobs, rows = example(settings)
    assert loss_of(logprobs, rows, settings).item() == pytest.approx(value, rel=2e-5)
    assert f"{value:.4f}" == printed
    lines = [x for x in PAGE.read_text().splitlines() if x.startswith(f"| `{settings.name}`")]
    assert any(f" {printed} |" in line for line in lines)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_gradient_equals_finite_differences(settings: Any, record_property: Any) -> None:
    rows = some_rows(settings)
    logprobs = some_logprobs(rows).requires_grad_()
    loss_of(logprobs, rows, settings).backward()
    assert logprobs.grad is not None
    step, numeric = 1e-6, torch.zeros_like(logprobs)
    with torch.no_grad():
        for place in np.ndindex(*logprobs.shape):
            values = []
            for sign in (1, -1):
                moved = logprobs.clone()
                moved[place] += sign * step
                values.append(loss_of(moved, rows, settings))
            numeric[place] = (values[0] - values[1]) / (2 * step)
    error = ((logprobs.grad - numeric).norm() / numeric.norm()).item()
    record_property("relative_gradient_error", error)
    assert error < 1e-8


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_rows_of_weight_zero_give_loss_zero_and_no_gradient_and_no_nan(settings: Any) -> None:
    rows = some_rows(settings)
    rows = replace(rows, weights=torch.zeros_like(rows.weights))
    logprobs = some_logprobs(rows).requires_grad_()
    found = loss_of(logprobs, rows, settings)
    found.backward()
    assert found.item() == 0 and logprobs.grad is not None and (logprobs.grad == 0).all()


@pytest.mark.parametrize("settings", BARE, ids=str)
def test_dead_pools_give_exactly_zero_gradient_and_live_ones_only_on_scored_labels(
    settings: Any,
) -> None:
    rows = some_rows(settings)
    logprobs = some_logprobs(rows).requires_grad_()
    loss_of(logprobs, rows, settings).backward()
    live = live_labels(rows)
    assert logprobs.grad is not None and live.any()
    assert (logprobs.grad[~live] == 0).all() and (logprobs.grad[live] != 0).all()


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_dead_pools_keep_their_rows_at_weight_zero(settings: Any) -> None:
    pools, found = some_pools()
    none = [rewards([math.nan] * 4)] * 5
    live, dead = (
        make_rows(pools, picks_for(pools, r, settings), length=9, pad=0) for r in (found, none)
    )
    assert live.tokens.shape == dead.tokens.shape
    assert len(live.weights) == len(dead.weights) and live.pairs.shape == dead.pairs.shape


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_loss_of_two_micro_batches_adds_up_to_that_of_one(settings: Any) -> None:
    pools, found = some_pools()
    whole = rows_of(settings, pools, found)
    logprobs = some_logprobs(whole)
    counts = {t.name: float(t.count) for t in terms_of(logprobs, whole, settings)}
    per_pool, parts = len(whole.tokens) // 5, torch.zeros((), dtype=torch.float64)
    for cut in (slice(0, 2), slice(2, 5)):
        place = slice(cut.start * per_pool, cut.stop * per_pool)
        rows = replace(
            rows_of(settings, pools[cut], found[cut]),
            reference_logprobs=whole.reference_logprobs[place],
            rollout_logprobs=whole.rollout_logprobs[place],
        )
        parts += total_loss(terms_of(logprobs[place], rows, settings), counts)
    torch.testing.assert_close(parts, loss_of(logprobs, whole, settings))


def test_total_loss_divides_each_term_by_its_own_global_count() -> None:
    rows = some_rows(DPO)
    terms = terms_of(some_logprobs(rows), rows, DPO)
    counts = {"dpo": 10.0, "suffix_nll": 100.0, "chosen_nll": 30.0, "prefix_nll": 1000.0}
    expected = terms[0].sum / 10 + 0.5 * terms[1].sum / 100
    expected = expected + 0.75 * terms[2].sum / 30 + 0.25 * terms[3].sum / 1000
    torch.testing.assert_close(total_loss(terms, counts), expected)
    assert [int(t.count) for t in terms] == [2, 15, 2 + 3, 12]  # pairs, then tokens


def test_segment_sums_and_lengths_count_each_label_once() -> None:
    rows = some_rows(DPO)
    ones = torch.ones(rows.tokens.shape)
    assert torch.equal(segment_sums(ones, rows).long(), segment_lengths(rows))
    assert int(segment_lengths(rows).sum()) == int((rows.segment_ids >= 0).sum())


def test_nll_by_hand() -> None:
    one = [pool(sample(1, (1, 2), (3, 4)))]
    rows = make_rows(one, picks_for(one, [rewards([])], NLL), length=4, pad=0)
    logprobs = torch.tensor([[-7.0, -1.0, -2.0, -100.0]])
    nll, prefix = terms_of(logprobs, rows, NLL)
    assert (nll.sum.item(), nll.count.item(), nll.weight) == (3.0, 2, 1.0)
    assert (prefix.sum.item(), prefix.count.item(), prefix.weight) == (7.0, 1, 0.4)
    assert loss_of(logprobs, rows, NLL).item() == pytest.approx(1.5 + 0.4 * 7.0)
    assert nll.metrics["objective/nll"].tolist() == [3.0, 2.0]


def test_nll_equals_the_formula() -> None:
    rows = some_rows(NLL)
    logprobs = some_logprobs(rows)
    widths = [3, 4, 3, 4, 3]  # prefix lengths
    suffix = sum(tokens_of(logprobs, b, p, 3).sum() for b, p in enumerate(widths))
    prefix = sum(logprobs[b, : p - 1].sum() for b, p in enumerate(widths))
    expected = -suffix / 15 - 0.4 * prefix / sum(p - 1 for p in widths)
    torch.testing.assert_close(loss_of(logprobs, rows, NLL), expected)


def test_rf_nll_equals_the_formula_and_leaves_the_pool_without_verdicts_out() -> None:
    pools, found = some_pools()
    found[3] = rewards([1, 4, 1, 1])  # a clear best
    rows = make_rows(pools, picks_for(pools, found, RF_NLL), length=9, pad=0)
    logprobs = some_logprobs(rows)
    widths = [3, 4, 3, 4, 3]
    best = [(0, 2), (2, 2), (3, 1), (4, 3)]  # pool, tokens of its best candidate
    total = sum(tokens_of(logprobs, b, widths[b], length).sum() for b, length in best)
    prefix = sum(logprobs[b, : p - 1].sum() for b, p in enumerate(widths))
    expected = -total / 8 - 0.4 * prefix / sum(p - 1 for p in widths)
    torch.testing.assert_close(loss_of(logprobs, rows, RF_NLL), expected.double())


def test_rf_nll_on_a_pool_of_one_equals_nll() -> None:
    one = pool(sample(1, (1, 2, 3), (4, 5)), candidate((4, 5), "suffix"))
    both = [
        make_rows([one], picks_for([one], [rewards([0.3])], s), length=5, pad=0)
        for s in (NLL, RF_NLL)
    ]
    assert all(torch.equal(getattr(both[0], n), getattr(both[1], n))
               for n in ("tokens", "labels", "segment_ids", "weights", "roles"))  # fmt: skip
    logprobs = some_logprobs(both[0])
    assert loss_of(logprobs, both[0], NLL) == loss_of(logprobs, both[1], RF_NLL)


def test_sft_learns_the_rewrite_whatever_its_reward_and_is_dead_without_one() -> None:
    settings = SftRewriteObjective(name="sft_rewrite")
    pools, found = some_pools()
    pools[1] = replace(pools[1], candidates=pools[1].candidates[2:])
    picks = [p for (p,) in picks_for(pools, found, settings)]
    assert [p.candidate for p in picks] == [1, -2, 1, 1, 1]
    assert [p.weight for p in picks] == [1, 0, 1, 1, 1]


def test_tied_best_is_drawn_by_seed_and_sample_not_by_place() -> None:
    settings = RfNllObjective(name="rf_nll")
    found = set()
    for sample_id in range(40):
        one = pool(sample(sample_id), *(candidate((i,)) for i in range(3)))
        found.add(picks_for([one], [rewards([1, 1, 0])], settings)[0][0].candidate)
    assert found == {0, 1}


def test_every_objective_of_the_recipe_is_registered() -> None:
    assert {s.name for s in ALL} == set(OBJECTIVES)
