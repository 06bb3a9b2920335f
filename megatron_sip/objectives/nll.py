"""NLL on one member of each pool: original suffix, rewrite, or best candidate (method 5.1-5.3).

    L = -(1 / T) sum_pools sum_t log pi(y_t | p, y_<t)      T: scored tokens of all ranks

Only the choice of y differs: nll takes the original suffix, sft_rewrite the rewrite, rf_nll the
candidate of the largest reward. Legend: R rows, S row length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sip.config_objective import NllObjective, RfNllObjective, SftRewriteObjective
from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, nll_term, prefix_pick
from megatron_sip.types import CandidatePool, LossTerm, Pick, PoolRewards, TrainRows

LIVE_SUFFIX = Pick(ORIGINAL_SUFFIX, "target", 0.0, 1.0)
DEAD = Pick(ORIGINAL_SUFFIX, "target", 0.0, 0.0)  # keeps the row of a pool without a target


def select_suffix(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: NllObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """The original suffix of every pool, whatever its reward (method 5.1).

    Returns: for each pool its target, then the prefix if the recipe trains on it.
    """
    return [(LIVE_SUFFIX, *prefix_pick(settings.prefix_weight)) for _ in pools]


def select_rewrite(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: SftRewriteObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """The rewrite of every pool, whatever its reward; a pool without one is dead (method 5.2).

    Returns: for each pool its target, then the prefix if the recipe trains on it.
    """
    picks = []
    for pool in pools:
        found = [i for i, c in enumerate(pool.candidates) if c.source == "rewrite"]
        target = Pick(found[0], "target", 0.0, 1.0) if found else DEAD
        picks.append((target, *prefix_pick(settings.prefix_weight)))
    return picks


def select_best(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: RfNllObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """argmax of the total reward over candidates that pass every gate; a pool without any is dead
    (method 5.3).

    Args:    order: for each pool, its valid candidates by rising reward, ties broken by seed.
    Returns: for each pool its target, then the prefix if the recipe trains on it.
    """
    return [
        (
            Pick(best[-1], "target", 0.0, 1.0) if best and reward.passes[best[-1]] else DEAD,
            *prefix_pick(settings.prefix_weight),
        )
        for best, reward in zip(order, rewards, strict=True)
    ]


def loss(
    logprobs_RS: torch.Tensor,
    rows: TrainRows,
    settings: NllObjective | SftRewriteObjective | RfNllObjective,
) -> tuple[LossTerm, ...]:
    """-log pi(target | prefix) a target token, plus optional next-token prediction on the prefix.

    Args:    logprobs_RS: float32[R, S], nats, of each row's labels under the policy.
    Returns: terms "nll" and, if prefix_weight > 0, "prefix_nll"; counts in tokens.
    """
    terms = [nll_term(logprobs_RS, rows, role="target", name="nll", weight=1.0)]
    weight = settings.prefix_weight
    if weight > 0:
        terms.append(nll_term(logprobs_RS, rows, role="prefix", name="prefix_nll", weight=weight))
    return tuple(terms)
