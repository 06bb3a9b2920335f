"""Objectives by name: `select` picks what to train on, `loss` says how; both pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sip.config_objective import Objective, needs_rewards
from megatron_sip.objectives import dpo, grpo, nll, pairs, simpo
from megatron_sip.pool import drawn_order, rank
from megatron_sip.types import CandidatePool, Pick, PoolRewards

OBJECTIVES = {
    "nll": (nll.select_suffix, nll.loss),
    "sft_rewrite": (nll.select_rewrite, nll.loss),
    "rf_nll": (nll.select_best, nll.loss),
    "dpo": (pairs.select_best_and_worst, dpo.loss),
    "dpo_rewrite": (dpo.select_rewrite_and_rollout, dpo.loss),
    "simpo": (pairs.select_best_and_worst, simpo.loss),
    "grpo": (grpo.select, grpo.loss),
}


def picks_of(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: Objective,
    *,
    seed: int,
) -> list[tuple[Pick, ...]]:
    """What an objective trains on of each pool; chance is a function of (seed, sample).

    Args: rewards: of each pool; an objective that does not need them gets its candidates in a
          drawn order instead.
    """
    judged = needs_rewards(settings)
    order = [
        rank(reward, seed=seed, sample_id=pool.sample.sample_id)
        if judged
        else drawn_order(len(pool.candidates), seed=seed, sample_id=pool.sample.sample_id)
        for pool, reward in zip(pools, rewards, strict=True)
    ]
    return OBJECTIVES[settings.name][0](pools, rewards, settings, order)
