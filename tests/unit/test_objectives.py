"""Objectives: hand-computed values, float64 references from the formulas, gradients, dead pools."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.config_objective import DpoObjective, NllObjective, RfNllObjective
from megatron_sip.objectives import OBJECTIVES
from megatron_sip.objectives.terms import segment_lengths, segment_sums, total_loss
from megatron_sip.pool import rank
from megatron_sip.rows import make_rows
from megatron_sip.types import CandidatePool, PoolRewards, TrainRows

NAN = float("nan")
NLL = NllObjective(name="nll", prefix_weight=0.4)
RF_NLL = RfNllObjective(name="rf_nll", prefix_weight=0.4)
DPO = DpoObjective(name="dpo", beta=0.7, suffix_weight=0.5, prefix_weight=0.25)
PLAIN_DPO = DpoObjective(name="dpo", beta=0.7)
ALL = [NLL, RF_NLL, DPO]


def some_pools() -> tuple[list[CandidatePool], list[PoolRewards]]:
    """Live, none valid, one valid, all equal, live."""
    pools = [
        pool(
            sample(i, range(1, 4 + i % 2), (20, 21, 22)),
            candidate((20, 21, 22), "suffix"),
            candidate((30 + i,), "rewrite"),
            candidate((40, 41)),
            candidate((50, 51, 52, 53)),
        )
        for i in range(5)
    ]
    totals = [[0, 1, 2, -1], [NAN] * 4, [NAN, NAN, 1, NAN], [1.0] * 4, [3, 1, NAN, 2]]
    return pools, [rewards(t) for t in totals]


def picks_of(pools: list[CandidatePool], found: list[PoolRewards], settings: Any) -> list[Any]:
    order = [
        rank(r, seed=3, sample_id=p.sample.sample_id) for p, r in zip(pools, found, strict=True)
    ]
    return OBJECTIVES[settings.name][0](pools, found, settings, order)


def some_rows(settings: Any) -> TrainRows:
    pools, found = some_pools()
    rows = make_rows(pools, picks_of(pools, found, settings), length=9, pad=0)
    generator = torch.Generator().manual_seed(2)
    reference = -torch.rand(rows.tokens.shape, generator=generator, dtype=torch.float64)
    return replace(rows, reference_logprobs=reference, weights=rows.weights.double())


def some_logprobs(rows: TrainRows) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return -3 * torch.rand(rows.tokens.shape, generator=generator, dtype=torch.float64)


def loss_of(logprobs: torch.Tensor, rows: TrainRows, settings: Any) -> torch.Tensor:
    terms = OBJECTIVES[settings.name][1](logprobs, rows, settings)
    return total_loss(terms, {t.name: float(t.count) for t in terms})


def tokens_of(logprobs: torch.Tensor, row: int, prefix: int, length: int) -> torch.Tensor:
    """Log-probs of a continuation of `length` tokens after `prefix` tokens."""
    return logprobs[row, prefix - 1 : prefix - 1 + length]


def test_nll_by_hand() -> None:
    rows = make_rows(
        [pool(sample(1, (1, 2), (3, 4)))], picks_of([pool(sample(1, (1, 2), (3, 4)))],
        [rewards([])], NLL), length=4, pad=0,
    )  # fmt: skip
    logprobs = torch.tensor([[-7.0, -1.0, -2.0, -100.0]])
    nll, prefix = OBJECTIVES["nll"][1](logprobs, rows, NLL)
    assert (nll.sum.item(), nll.count.item(), nll.weight) == (3.0, 2, 1.0)
    assert (prefix.sum.item(), prefix.count.item(), prefix.weight) == (7.0, 1, 0.4)
    assert loss_of(logprobs, rows, NLL).item() == pytest.approx(1.5 + 0.4 * 7.0)
    assert nll.metrics["objective/nll"].tolist() == [3.0, 2.0]


def test_dpo_by_hand() -> None:
    one = pool(sample(1, (1, 2), (3,)), candidate((3, 4)), candidate((5,)))
    rows = make_rows([one], picks_of([one], [rewards([2, 1])], PLAIN_DPO), length=4, pad=0)
    logprobs = torch.tensor([[-9.0, -1.0, -2.0, -9.0], [-9.0, -4.0, -9.0, -9.0]])
    reference = torch.tensor([[-9.0, -1.5, -2.5, -9.0], [-9.0, -3.5, -9.0, -9.0]])
    (term,) = OBJECTIVES["dpo"][1](logprobs, replace(rows, reference_logprobs=reference), PLAIN_DPO)
    # chosen ratio -3 + 4 = 1, rejected ratio -4 + 3.5 = -0.5, margin 1.5
    assert term.sum.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.7 * 1.5))))
    assert term.count.item() == 1
    assert term.metrics["objective/margin"].tolist() == [1.5, 1.0]
    assert term.metrics["objective/chosen_logratio"].tolist() == [1.0, 1.0]
    assert term.metrics["objective/rejected_logratio"].tolist() == [-0.5, 1.0]
    assert term.metrics["objective/margin_accuracy"].tolist() == [1.0, 1.0]


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
    rows = make_rows(pools, picks_of(pools, found, RF_NLL), length=9, pad=0)
    logprobs = some_logprobs(rows)
    widths = [3, 4, 3, 4, 3]
    best = [(0, 2), (2, 2), (3, 1), (4, 3)]  # pool, tokens of its best candidate
    total = sum(tokens_of(logprobs, b, widths[b], length).sum() for b, length in best)
    prefix = sum(logprobs[b, : p - 1].sum() for b, p in enumerate(widths))
    expected = -total / 8 - 0.4 * prefix / sum(p - 1 for p in widths)
    torch.testing.assert_close(loss_of(logprobs, rows, RF_NLL), expected.double())


def test_dpo_equals_the_formula_with_suffix_and_prefix_terms() -> None:
    rows = some_rows(DPO)
    logprobs, reference = some_logprobs(rows), rows.reference_logprobs
    widths = [3, 4, 3, 4, 3]
    pairs = {0: (2, 4), 4: (3, 1)}  # live pool: tokens of chosen, of rejected
    expected = torch.zeros((), dtype=torch.float64)
    for b, (chosen, rejected) in pairs.items():
        ratio = [
            (tokens_of(logprobs, row, widths[b], n) - tokens_of(reference, row, widths[b], n)).sum()
            for row, n in ((3 * b, chosen), (3 * b + 1, rejected))
        ]
        expected = expected - torch.log(torch.sigmoid(0.7 * (ratio[0] - ratio[1]))) / 2
    for b, p in enumerate(widths):  # rows of a pool: chosen, rejected, suffix
        expected = expected - 0.5 * tokens_of(logprobs, 3 * b + 2, p, 3).sum() / 15
        expected = expected - 0.25 * logprobs[3 * b, : p - 1].sum() / sum(p - 1 for p in widths)
    torch.testing.assert_close(loss_of(logprobs, rows, DPO), expected)


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.name)
def test_gradient_equals_finite_differences(settings: Any) -> None:
    rows = some_rows(settings)
    logprobs = some_logprobs(rows).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(x, rows, settings), (logprobs,))
    terms = OBJECTIVES[settings.name][1]
    for index in range(len(terms(logprobs, rows, settings))):
        assert torch.autograd.gradcheck(
            lambda x, i=index: terms(x, rows, settings)[i].sum, logprobs
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margin_is_zero_and_loss_ln_two_exactly_when_policy_equals_reference(dtype: Any) -> None:
    rows = some_rows(PLAIN_DPO)
    logprobs = some_logprobs(rows).to(dtype)
    rows = replace(rows, reference_logprobs=logprobs.clone(), weights=rows.weights.to(dtype))
    (term,) = OBJECTIVES["dpo"][1](logprobs, rows, PLAIN_DPO)
    assert term.metrics["objective/margin"].tolist() == [0.0, 2.0]
    assert term.count.item() == 2
    assert term.sum.item() == 2 * torch.tensor(math.log(2), dtype=dtype).item()


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    rows = some_rows(PLAIN_DPO)
    swapped = replace(rows, pairs=rows.pairs.flip(1))
    logprobs = some_logprobs(rows)
    there, back = (OBJECTIVES["dpo"][1](logprobs, r, PLAIN_DPO)[0] for r in (rows, swapped))
    margins = [t.metrics["objective/margin"] for t in (there, back)]
    assert margins[0][0] == -margins[1][0] != 0
    assert there.sum != back.sum


@pytest.mark.parametrize("settings", [PLAIN_DPO, RfNllObjective(name="rf_nll")], ids=str)
def test_dead_pools_give_exactly_zero_gradient_and_live_ones_only_on_scored_labels(
    settings: Any,
) -> None:
    rows = some_rows(settings)
    logprobs = some_logprobs(rows).requires_grad_()
    loss_of(logprobs, rows, settings).backward()
    weight = torch.cat([rows.weights, rows.weights.new_zeros(1)])[rows.segment_ids.long()]
    assert logprobs.grad is not None
    assert (logprobs.grad[weight == 0] == 0).all()
    assert (logprobs.grad[weight > 0] != 0).all() and (weight > 0).any()


def test_rows_of_weight_zero_give_loss_zero_and_no_nan() -> None:
    for settings in ALL:
        rows = some_rows(settings)
        rows = replace(rows, weights=torch.zeros_like(rows.weights))
        logprobs = some_logprobs(rows).requires_grad_()
        found = loss_of(logprobs, rows, settings)
        found.backward()
        assert found.item() == 0 and logprobs.grad is not None and (logprobs.grad == 0).all()


def test_rf_nll_on_a_pool_of_one_equals_nll() -> None:
    one = pool(sample(1, (1, 2, 3), (4, 5)), candidate((4, 5), "suffix"))
    both = [
        make_rows([one], picks_of([one], [rewards([0.3])], s), length=5, pad=0)
        for s in (NLL, RF_NLL)
    ]
    assert all(torch.equal(getattr(both[0], n), getattr(both[1], n))
               for n in ("tokens", "labels", "segment_ids", "weights", "roles"))  # fmt: skip
    logprobs = some_logprobs(both[0])
    assert loss_of(logprobs, both[0], NLL) == loss_of(logprobs, both[1], RF_NLL)


@pytest.mark.parametrize("settings", [RF_NLL, DPO, PLAIN_DPO], ids=str)
def test_choice_follows_the_candidates_when_the_pool_is_shuffled(settings: Any) -> None:
    rng = np.random.default_rng(0)
    candidates = [candidate((i, i + 1), "rollout") for i in range(6)]
    totals = np.float32([0, 5, 2, NAN, 1, 3])
    chosen = set()
    for _ in range(20):
        order = rng.permutation(6)
        one = pool(sample(), *(candidates[i] for i in order))
        (found,) = picks_of([one], [rewards(totals[order])], settings)
        chosen.add(tuple((p.role, int(order[p.candidate])) for p in found if p.candidate >= 0))
    expected = (("target", 1),) if settings.name == "rf_nll" else (("chosen", 1), ("rejected", 0))
    assert chosen == {expected}


def test_tied_best_is_drawn_by_seed_and_sample_not_by_place() -> None:
    settings = RfNllObjective(name="rf_nll")
    found = set()
    for sample_id in range(40):
        one = pool(sample(sample_id), *(candidate((i,)) for i in range(3)))
        found.add(picks_of([one], [rewards([1, 1, 0])], settings)[0][0].candidate)
    assert found == {0, 1}


def test_dead_pools_keep_their_rows_at_weight_zero() -> None:
    pools, found = some_pools()
    weights = [[p.weight for p in of_pool] for of_pool in picks_of(pools, found, PLAIN_DPO)]
    assert weights == [[1, 1], [0, 0], [0, 0], [0, 0], [1, 1]]
    none = [rewards([NAN] * 4)] * 5
    for settings in (PLAIN_DPO, DPO, RF_NLL):
        live, dead = (
            make_rows(pools, picks_of(pools, r, settings), length=9, pad=0) for r in (found, none)
        )
        assert live.tokens.shape == dead.tokens.shape
        assert len(live.weights) == len(dead.weights) and live.pairs.shape == dead.pairs.shape
    best = picks_of(pools, found, RfNllObjective(name="rf_nll"))
    assert [p[0].weight for p in best] == [1, 0, 1, 1, 1]


def test_second_pair_is_second_best_with_second_worst_and_dead_when_there_are_too_few() -> None:
    settings = DpoObjective(name="dpo", pairs_per_pool=2)
    one = pool(sample(), *(candidate((i,)) for i in range(4)))
    (found,) = picks_of([one], [rewards([3, 0, 2, 1])], settings)
    assert [(p.candidate, p.role, p.weight) for p in found] == [
        (0, "chosen", 1.0), (1, "rejected", 1.0), (2, "chosen", 1.0), (3, "rejected", 1.0),
    ]  # fmt: skip
    (found,) = picks_of([one], [rewards([3, 0, 2, NAN])], settings)
    assert [p.weight for p in found] == [1, 1, 0, 0]


def test_pairs_come_from_the_allowed_sources_only() -> None:
    settings = DpoObjective(name="dpo", pair_sources=("rollout",))
    one = pool(
        sample(), candidate((1,), "suffix"), candidate((2,)), candidate((3,)),
        candidate((4,), "rewrite"),
    )  # fmt: skip
    (found,) = picks_of([one], [rewards([9, 1, 2, -9])], settings)
    assert [(p.candidate, p.weight) for p in found] == [(2, 1.0), (1, 1.0)]


def test_total_loss_divides_each_term_by_its_own_global_count() -> None:
    rows = some_rows(DPO)
    terms = OBJECTIVES["dpo"][1](some_logprobs(rows), rows, DPO)
    counts = {"dpo": 10.0, "suffix_nll": 100.0, "prefix_nll": 1000.0}
    expected = terms[0].sum / 10 + 0.5 * terms[1].sum / 100 + 0.25 * terms[2].sum / 1000
    torch.testing.assert_close(total_loss(terms, counts), expected)
    assert [int(t.count) for t in terms] == [2, 15, 12]


def test_loss_of_two_micro_batches_adds_up_to_that_of_one() -> None:
    pools, found = some_pools()
    picks = picks_of(pools, found, DPO)
    whole = make_rows(pools, picks, length=9, pad=0)
    logprobs = some_logprobs(whole)
    counts = {t.name: float(t.count) for t in OBJECTIVES["dpo"][1](logprobs, whole, DPO)}
    parts = torch.zeros((), dtype=torch.float64)
    for cut, rows_cut in ((slice(0, 2), slice(0, 6)), (slice(2, 5), slice(6, 15))):
        rows = make_rows(pools[cut], picks[cut], length=9, pad=0)
        parts += total_loss(OBJECTIVES["dpo"][1](logprobs[rows_cut], rows, DPO), counts)
    torch.testing.assert_close(parts, loss_of(logprobs, whole, DPO))


def test_segment_sums_and_lengths_count_each_label_once() -> None:
    rows = some_rows(DPO)
    ones = torch.ones(rows.tokens.shape)
    assert torch.equal(segment_sums(ones, rows).long(), segment_lengths(rows))
    assert int(segment_lengths(rows).sum()) == int((rows.segment_ids >= 0).sum())
