"""NLL on the original suffix, and reward-filtered NLL on the best candidate (method 5.1-5.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sip.config_objective import NllObjective, RfNllObjective
from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, nll_term, prefix_pick
from megatron_sip.types import CandidatePool, LossTerm, Pick, PoolRewards, TrainRows


def select_suffix(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: NllObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """The original suffix of every pool, whatever its reward."""
    target = Pick(ORIGINAL_SUFFIX, "target", 0.0, 1.0)
    return [(target, *prefix_pick(settings.prefix_weight)) for _ in pools]


def select_best(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: RfNllObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """argmax of the total reward over valid candidates; a pool without any is dead.

    Args:    order: for each pool, its valid candidates by rising reward, ties broken by seed.
    """
    return [
        (
            Pick(best[-1], "target", 0.0, 1.0)
            if best
            else Pick(ORIGINAL_SUFFIX, "target", 0.0, 0.0),
            *prefix_pick(settings.prefix_weight),
        )
        for best in order
    ]


def loss(
    logprobs_RS: torch.Tensor, rows: TrainRows, settings: NllObjective | RfNllObjective
) -> tuple[LossTerm, ...]:
    """-log pi(target | prefix) a target token, plus optional NTP on the prefix.

    Args:    logprobs_RS: float32[R, S], nats, of each row's labels under the policy.
    """
    terms = [nll_term(logprobs_RS, rows, role="target", name="nll", weight=1.0)]
    if settings.prefix_weight > 0:
        terms.append(
            nll_term(
                logprobs_RS, rows, role="prefix", name="prefix_nll", weight=settings.prefix_weight
            )
        )
    return tuple(terms)
