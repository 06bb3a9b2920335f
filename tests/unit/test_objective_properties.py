"""What holds for any pool: permutation, padding, ties, dead pools, one candidate, early ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_helpers import loss_of, picks_for
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.config_judge import AllPairs, LikelihoodCriterion, PairwiseCriterion
from megatron_sip.config_objective import (
    DpoObjective,
    DpoRewriteObjective,
    GrpoObjective,
    NllObjective,
    RfNllObjective,
    SftRewriteObjective,
    SimpoObjective,
)
from megatron_sip.judge.schedules import next_questions
from megatron_sip.judge.scoring import score_pool
from megatron_sip.rows import make_micro_batches, make_rows
from megatron_sip.types import CandidatePool, Pick, PoolRewards, RowLayout, Verdict

SUFFIX = 6  # N: longest candidate
OBJECTIVES: list[Any] = [
    NllObjective(name="nll", prefix_weight=0.5),
    SftRewriteObjective(name="sft_rewrite"),
    RfNllObjective(name="rf_nll"),
    DpoObjective(name="dpo", pairs_per_pool=2, suffix_weight=0.5),
    DpoObjective(name="dpo", logprobs="mean", chosen_weight=0.5),
    DpoRewriteObjective(name="dpo_rewrite", pairs_per_pool=2),
    SimpoObjective(name="simpo"),
    GrpoObjective(name="grpo", kl_weight=0.1, suffix_weight=0.5),
]
RANKED = [x for x in OBJECTIVES if x.name in ("rf_nll", "dpo", "simpo", "grpo")]
few = settings(max_examples=60, deadline=None)

ALL_PAIRS = AllPairs(name="all_pairs")


@st.composite
def pools(draw: Any, max_size: int = 4) -> tuple[list[CandidatePool], list[PoolRewards]]:
    """Pools of 1 to 6 candidates of 1 to N tokens; rewards from few values, so that ties abound.

    The tokens of a candidate say its pool and its place, so that it is known again.
    """
    made, found = [], []
    for b in range(draw(st.integers(1, max_size))):
        sources = draw(st.lists(st.sampled_from(["suffix", "rewrite", "rollout"]), min_size=1,
                                max_size=6))  # fmt: skip
        lengths = [draw(st.integers(1, SUFFIX)) for _ in sources]  # EOS may come early
        members = [
            candidate([10 * b + i] * n, source)
            for i, (source, n) in enumerate(zip(sources, lengths, strict=True))
        ]
        one = sample(b, range(1, draw(st.integers(3, 5))), range(90, 90 + SUFFIX))
        made.append(pool(one, *members))
        values = st.sampled_from([0.0, 0.25, 1.0, float("nan")])
        found.append(rewards([draw(values) for _ in sources]))
    return made, found


def shuffled(one: CandidatePool, of: PoolRewards, order: list[int]) -> tuple[Any, Any]:
    members = tuple(one.candidates[i] for i in order)
    return replace(one, candidates=members), replace(
        of, total=of.total[order], valid=of.valid[order], passes=of.passes[order]
    )


def meaning(of_pool: tuple[Pick, ...], one: CandidatePool) -> Counter[tuple[Any, ...]]:
    """Live picks by what they train on, not by place."""
    return Counter(
        (p.role, round(p.advantage, 9),
         one.candidates[p.candidate].token_ids.tobytes() if p.candidate >= 0 else p.candidate)
        for p in of_pool if p.weight
    )  # fmt: skip


def logprobs_by_content(rows: Any) -> torch.Tensor:
    """Log-probs that hang on label and position alone, like a model's."""
    place = torch.arange(rows.labels.shape[1], dtype=torch.float64)
    return -torch.cos(rows.labels.double() * 0.7 + place).square() * 3 - 0.1


def with_reference(rows: Any) -> Any:
    reference = 0.8 * logprobs_by_content(rows) - 0.2
    return replace(rows, reference_logprobs=reference, weights=rows.weights.double())


@few
@given(pools(), st.randoms())
@pytest.mark.parametrize("objective", RANKED, ids=str)
def test_choice_does_not_hang_on_the_order_of_candidates_without_ties(
    objective: Any, drawn: Any, random: Any
) -> None:
    made, found = drawn
    for one, of in zip(made, found, strict=True):
        totals = of.total + np.arange(len(of.total), dtype=np.float32) / 64  # no two are equal
        of = replace(of, total=np.where(of.valid, totals, np.nan).astype(np.float32))
        order = list(range(len(one.candidates)))
        random.shuffle(order)
        moved, moved_rewards = shuffled(one, of, order)
        (here,), (there,) = (
            picks_for([one], [of], objective), picks_for([moved], [moved_rewards], objective)
        )  # fmt: skip
        assert meaning(here, one) == meaning(there, moved)


@few
@given(pools())
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_picks_are_finite_and_live_ones_are_valid_and_distinct(objective: Any, drawn: Any) -> None:
    made, found = drawn
    for one, of, picks in zip(made, found, picks_for(made, found, objective), strict=True):
        for pick in picks:
            assert pick.weight in (0.0, 1.0) and np.isfinite(pick.advantage)
            assert -2 <= pick.candidate < len(one.candidates)
            judged = objective.name in ("rf_nll", "dpo", "simpo", "grpo")
            if judged and pick.weight and pick.candidate >= 0:
                assert of.valid[pick.candidate]
        chosen = [p for p in picks if p.role == "chosen"]
        rejected = [p for p in picks if p.role == "rejected"]
        for up, down in zip(chosen, rejected, strict=True):
            assert up.weight == down.weight
            if up.weight:
                assert up.candidate != down.candidate
                if objective.name != "dpo_rewrite":
                    assert of.total[up.candidate] > of.total[down.candidate]


@few
@given(pools())
def test_advantages_of_a_pool_sum_to_zero_and_ignore_the_invalid(drawn: Any) -> None:
    made, found = drawn
    objective = GrpoObjective(name="grpo")
    for one, of, picks in zip(made, found, picks_for(made, found, objective), strict=True):
        live = [p.advantage for p in picks if p.weight]
        assert len(live) != 1 and abs(sum(live)) < 1e-9
        assert not live or np.mean(np.square(live)) == pytest.approx(1, rel=1e-4)
        rest = [i for i in range(len(one.candidates)) if of.valid[i]]
        if rest:
            kept, kept_rewards = shuffled(one, of, rest)
            (alone,) = picks_for([kept], [kept_rewards], objective)
            assert [p.advantage for p in alone if p.weight] == live


@few
@given(pools(), st.integers(0, 7))
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_and_gradient_do_not_hang_on_padding(objective: Any, drawn: Any, more: int) -> None:
    made, found = drawn
    picks = picks_for(made, found, objective)
    length = 4 + SUFFIX - 1
    results = []
    for width in (length, length + more):
        rows = with_reference(make_rows(made, picks, length=width, pad=0))
        logprobs = logprobs_by_content(rows).requires_grad_()
        value = loss_of(logprobs, rows, objective)
        value.backward()
        assert logprobs.grad is not None and torch.isfinite(logprobs.grad).all()
        assert (logprobs.grad[rows.segment_ids < 0] == 0).all()
        results.append((value.item(), logprobs.grad[:, :length]))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@few
@given(pools())
@pytest.mark.parametrize("objective", RANKED, ids=str)
def test_a_dead_pool_changes_nothing(objective: Any, drawn: Any) -> None:
    bare = objective.model_copy(update={"suffix_weight": 0.0})
    made, found = drawn
    dead = pool(sample(9), candidate((1, 1), "rollout"), candidate((2,), "rewrite"))
    dead_rewards = rewards([float("nan")] * 2)
    results = []
    for some, of in ((made, found), ([*made, dead], [*found, dead_rewards])):
        rows = with_reference(make_rows(some, picks_for(some, of, bare), length=12, pad=0))
        results.append(loss_of(logprobs_by_content(rows), rows, bare).item())
    assert results[0] == pytest.approx(results[1], abs=1e-12)


@few
@given(pools(max_size=5), st.integers(1, 3))
@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_micro_batches_of_uneven_pools_have_one_shape_and_the_same_live_segments(
    objective: Any, layout: RowLayout, drawn: Any, size: int
) -> None:
    made, found = drawn
    made, found = made * size, found * size  # a multiple of the micro-batch
    picks = picks_for(made, found, objective)
    batches = make_micro_batches(
        made, picks, micro_batch_size=size, layout=layout, length=12, multiple=1, pad=0
    )
    assert len({b.tokens.shape for b in batches}) == 1 and len(batches[0].tokens) > 0
    live = sum(int((b.weights > 0).sum()) for b in batches)
    assert live == sum(p.weight > 0 for of_pool in picks for p in of_pool)
    for batch in batches:
        labels = batch.segment_ids.unique().tolist()
        assert set(range(len(batch.weights))) <= set(labels)  # every segment has a label
        assert all(batch.group_ids[a] == batch.group_ids[b] for a, b in batch.pairs.tolist())


@few
@given(pools(), st.randoms())
def test_rewards_of_a_pool_permute_with_its_candidates_and_drop_what_is_not_finite(
    drawn: Any, random: Any
) -> None:
    criteria = (
        PairwiseCriterion(form="pairwise", name="q", server="j", prompt="p"),
        LikelihoodCriterion(form="likelihood", name="l", server="j", weight=0.5),
    )
    for one in drawn[0]:
        count = len(one.candidates)
        asked = next_questions(ALL_PAIRS, (), count, 3, criteria=criteria)
        scores = [random.choice([0.0, 0.5, 1.0, None, float("nan"), float("inf")]) for _ in asked]
        verdicts = [
            Verdict(q.criterion, q.candidate, q.opponent, q.vote, s, "")
            for q, s in zip(asked, scores, strict=True)
        ]
        got = score_pool(verdicts, count, criteria, ALL_PAIRS)
        assert np.isfinite(got.total[got.valid]).all() and np.isnan(got.total[~got.valid]).all()
        assert got.num_missing == sum(s is None or not np.isfinite(s) for s in scores)
        order = list(range(count))
        random.shuffle(order)
        moved = [
            replace(v, candidate=order[v.candidate], opponent=order[v.opponent])
            if v.opponent >= 0
            else replace(v, candidate=order[v.candidate])
            for v in verdicts
        ]
        again = score_pool(moved, count, criteria, ALL_PAIRS)
        np.testing.assert_allclose(again.total[order], got.total, rtol=1e-6)
        np.testing.assert_array_equal(again.valid[order], got.valid)
