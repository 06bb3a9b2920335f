"""Pools: who is in, in which order, and what chance alone would choose."""

from __future__ import annotations

import numpy as np
import pytest
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.config_judge import Guards
from megatron_sip.pool import (
    assemble_pool,
    chance_of_rollout,
    rank,
    rollout_wins,
    suffix_candidate,
)

NAN = float("nan")


def test_chance_is_the_share_of_rollouts() -> None:
    assert chance_of_rollout(["suffix", "rewrite", "rollout", "rollout"]) == 0.5
    with pytest.raises(ValueError, match="without candidates"):
        chance_of_rollout([])


def test_suffix_becomes_a_candidate_of_the_data() -> None:
    made = suffix_candidate(sample(suffix=(4, 5)), "words")
    assert (made.source, made.policy_version, made.finish_reason) == ("suffix", -1, "data")
    assert made.token_ids.tolist() == [4, 5] and len(made.logprobs) == 0


def test_guarded_candidates_leave_with_their_reason_and_chance_counts_those_who_stay() -> None:
    members = [
        candidate((1, 2, 3), "suffix"),
        candidate((1, 2, 3)),
        candidate((1, 2)),
        candidate((1, 2, 3), text=" \n"),
    ]
    made = assemble_pool(sample(), "prefix", "words", members, min_tokens=3, guards=Guards())
    assert made.candidates == tuple(members[:2])
    assert [(c.guard, c.token_ids.tolist()) for c in made.guarded] == [
        ("too_short", [1, 2]),
        ("empty", [1, 2, 3]),
    ]
    assert made.chance_rollout == 0.5


def test_a_pool_of_nobody_holds_the_suffix_alone() -> None:
    of = sample(7, suffix=(4, 5))
    made = assemble_pool(of, "prefix", "words", [candidate((1,))], min_tokens=2, guards=Guards())
    assert [(c.source, c.text) for c in made.candidates] == [("suffix", "words")]
    assert len(made.guarded) == 1 and made.chance_rollout == 0.0


def test_whom_a_gate_stops_ranks_below_all_that_pass() -> None:
    made = rewards([0.5, 9.0, -1.0, 2.0], passes=[True, False, True, False])
    assert rank(made, seed=1, sample_id=2) == [3, 1, 2, 0]


def test_rank_rises_and_leaves_invalid_candidates_out() -> None:
    assert rank(rewards([0.5, NAN, -1.0, 2.0]), seed=1, sample_id=2) == [2, 0, 3]
    assert rank(rewards([1.0, 9.0], valid=[True, False]), seed=1, sample_id=2) == [0]
    assert rank(rewards([NAN, NAN]), seed=1, sample_id=2) == []


def test_ties_are_ordered_by_seed_and_sample_and_every_place_is_equally_likely() -> None:
    tied = rewards([1.0] * 4)
    assert rank(tied, seed=1, sample_id=5) == rank(tied, seed=1, sample_id=5)
    orders = {tuple(rank(tied, seed=s, sample_id=5)) for s in range(60)}
    assert len(orders) > 15
    assert {tuple(rank(tied, seed=1, sample_id=i)) for i in range(60)} != {(0, 1, 2, 3)}
    best = np.bincount([rank(tied, seed=1, sample_id=i)[-1] for i in range(2000)], minlength=4)
    assert best.min() > 400 and best.max() < 600  # 500 expected, 3 sigma is 58


def test_wins_over_the_suffix_count_ties_half_and_skip_the_invalid() -> None:
    members = pool(
        sample(),
        candidate((1,), "suffix"),
        candidate((1,), "rewrite"),
        *(candidate((1,)) for _ in range(4)),
    )
    assert rollout_wins(members, rewards([0.0, 9.0, 1.0, 0.0, -1.0, NAN])) == (1.5, 3)
    assert rollout_wins(members, rewards([NAN, 9.0, 1.0, 0.0, -1.0, 2.0])) == (0.0, 0)
