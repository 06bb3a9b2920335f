"""Online DPO (method 5.4, 5.5 and 5.7; arXiv 2305.18290, equation 7).

    s(y) = log pi(y|p) - log ref(y|p)      summed over y's tokens, or their mean
    L = -log sigmoid(beta (s(y+) - s(y-)))

`dpo` takes the best and the worst candidates of a pool; `dpo_rewrite` asks no judge and prefers the
rewrite to a rollout. Legend: R rows, S row length, M segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_sip.config_objective import DpoObjective, DpoRewriteObjective
from megatron_sip.objectives.pairs import pair_picks, pair_term
from megatron_sip.objectives.terms import segment_means, segment_sums, side_terms
from megatron_sip.types import CandidatePool, LossTerm, Pick, PoolRewards, TrainRows


def select_rewrite_and_rollout(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: DpoRewriteObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """The rewrite over `pairs_per_pool` rollouts, whatever their rewards (method 5.5).

    Args:    order: for each pool, its candidates in an order drawn by seed; the first rollouts in
             it are rejected.
    Returns: for each pool the picks of its pairs, dead ones (no rewrite, or too few rollouts) with
             weight 0, then the suffix and the prefix if the recipe trains on them.
    """
    picks = []
    for pool, drawn in zip(pools, order, strict=True):
        sources = [c.source for c in pool.candidates]
        rollouts = [i for i in drawn if sources[i] == "rollout"][: settings.pairs_per_pool]
        rewrites = [i for i in drawn if sources[i] == "rewrite"]
        pairs = [(chosen, rejected, True) for chosen in rewrites for rejected in rollouts]
        picks.append(pair_picks(pairs, settings, settings.pairs_per_pool))
    return picks


def loss(
    logprobs_RS: torch.Tensor, rows: TrainRows, settings: DpoObjective | DpoRewriteObjective
) -> tuple[LossTerm, ...]:
    """DPO over live pairs, plus optional NLL on suffix, chosen candidates and prefix.

        h = s(y+) - s(y-),   L = -log sigmoid(beta h),   dL/dh = -beta sigmoid(-beta h)

    Args:    logprobs_RS: float32[R, S], nats, of each row's labels under the policy;
             the reference's are in `rows.reference_logprobs`.
    Returns: term "dpo", whose count is live pairs, then the terms of `terms.side_terms`.
    """
    reduce = segment_sums if settings.logprobs == "sum" else segment_means
    ratio_M = reduce(logprobs_RS - rows.reference_logprobs, rows)

    def loss_of(margin_Q: torch.Tensor) -> torch.Tensor:
        return F.softplus(-settings.beta * margin_Q)

    term = pair_term("dpo", ratio_M, rows, loss_of=loss_of, score="logratio")
    return (term, *side_terms(logprobs_RS, rows, settings))
