"""Pieces that objectives share: sums by segment, and the NLL terms.

Legend: R rows, S row length, M segments, Q pairs.
"""

from __future__ import annotations

import torch

from megatron_sip.types import ROLES, LossTerm, Pick, Role, TrainRows

PREFIX, ORIGINAL_SUFFIX = -1, -2  # values of Pick.candidate that name parts of the sample itself


def segment_sums(values_RS: torch.Tensor, rows: TrainRows) -> torch.Tensor:
    """Sum of `values_RS` over each segment's label positions. Returns float[M]."""
    inside = rows.segment_ids >= 0
    sums_M = values_RS.new_zeros(rows.weights.numel())
    return sums_M.index_add(0, rows.segment_ids[inside].long(), values_RS[inside])


def segment_lengths(rows: TrainRows) -> torch.Tensor:
    """Scored tokens of each segment. Returns int64[M]."""
    inside = rows.segment_ids[rows.segment_ids >= 0].long()
    return torch.bincount(inside, minlength=rows.weights.numel())


def nll_term(
    logprobs_RS: torch.Tensor, rows: TrainRows, *, role: Role, name: str, weight: float
) -> LossTerm:
    """Negative log-likelihood of the live segments of one role, in nats; counts their tokens.

    sum = -sum_m w_m sum_t logp_t, count = sum of lengths where w_m > 0 (method 5.1).
    """
    of_role_M = rows.roles == ROLES.index(role)
    weights_M = rows.weights * of_role_M
    total = -(weights_M * segment_sums(logprobs_RS, rows)).sum()
    count = (segment_lengths(rows) * (weights_M > 0)).sum()
    metric = torch.stack([total.detach(), count.to(total.dtype)])
    return LossTerm(name, total, count, weight, {f"objective/{name}": metric})


def prefix_pick(weight: float) -> tuple[Pick, ...]:
    """The prefix as a segment of its own, when the recipe trains on it."""
    return (Pick(PREFIX, "prefix", 0.0, 1.0),) if weight > 0 else ()


def total_loss(terms: tuple[LossTerm, ...], global_counts: dict[str, float]) -> torch.Tensor:
    """Sum over terms of weight x sum / global count; a term whose global count is 0 is 0."""
    parts = [t.sum * (t.weight / max(global_counts[t.name], 1.0)) for t in terms]
    return torch.stack(parts).sum()
