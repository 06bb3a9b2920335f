"""Online DPO on the best and the worst of a pool (method 5.4, arXiv 2305.18290).

    h = [log pi(y+|p) - log ref(y+|p)] - [log pi(y-|p) - log ref(y-|p)]
    L = -log sigmoid(beta h)

Legend: R rows, S row length, M segments, Q pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_sip.config_objective import DpoObjective
from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, nll_term, prefix_pick, segment_sums
from megatron_sip.types import (
    CandidatePool,
    LossTerm,
    Pick,
    PoolRewards,
    Role,
    TrainRows,
)


def select(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: DpoObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """Best with worst, second best with second worst, ... among `pair_sources`.

    Args:    order: for each pool, its valid candidates by rising reward, ties broken by seed.
    Returns: for each pool the picks of `pairs_per_pool` pairs, dead ones (too few candidates, or
             equal rewards) with weight 0, then the suffix and the prefix if the recipe trains
             on them.
    """
    extra = prefix_pick(settings.prefix_weight)
    if settings.suffix_weight > 0:
        extra = (Pick(ORIGINAL_SUFFIX, "target", 0.0, 1.0), *extra)
    picks = []
    for pool, reward, ranked in zip(pools, rewards, order, strict=True):
        allowed = [i for i in ranked if pool.candidates[i].source in settings.pair_sources]
        pairs: list[Pick] = []
        for q in range(settings.pairs_per_pool):
            live = q < len(allowed) // 2
            chosen, rejected = (allowed[-1 - q], allowed[q]) if live else (0, 0)
            live = live and bool(reward.total[chosen] > reward.total[rejected])
            pairs += [
                Pick(chosen, "chosen", 0.0, float(live)),
                Pick(rejected, "rejected", 0.0, float(live)),
            ]
        picks.append((*pairs, *extra))
    return picks


def loss(
    logprobs_RS: torch.Tensor, rows: TrainRows, settings: DpoObjective
) -> tuple[LossTerm, ...]:
    """DPO over live pairs, plus optional NLL on the suffix and NTP on the prefix.

    Args:    logprobs_RS: float32[R, S], nats, of each row's labels under the policy;
             the reference's are in `rows.reference_logprobs`.
    """
    ratio_M = segment_sums(logprobs_RS - rows.reference_logprobs, rows)
    chosen_Q, rejected_Q = rows.pairs.unbind(1)
    live_Q = rows.weights[chosen_Q]
    margin_Q = ratio_M[chosen_Q] - ratio_M[rejected_Q]
    total = (live_Q * F.softplus(-settings.beta * margin_Q)).sum()
    count = (live_Q > 0).sum()

    def mean(values_Q: torch.Tensor) -> torch.Tensor:
        return torch.stack([(live_Q * values_Q.detach()).sum(), live_Q.sum()])

    metrics = {
        "objective/dpo": mean(F.softplus(-settings.beta * margin_Q)),
        "objective/margin": mean(margin_Q),
        "objective/margin_accuracy": mean((margin_Q > 0).float()),
        "objective/chosen_logratio": mean(ratio_M[chosen_Q]),
        "objective/rejected_logratio": mean(ratio_M[rejected_Q]),
    }
    terms = [LossTerm("dpo", total, count, 1.0, metrics)]
    extra: tuple[tuple[Role, str, float], ...] = (
        ("target", "suffix_nll", settings.suffix_weight),
        ("prefix", "prefix_nll", settings.prefix_weight),
    )
    terms += [
        nll_term(logprobs_RS, rows, role=role, name=name, weight=weight)
        for role, name, weight in extra
        if weight > 0
    ]
    return tuple(terms)
