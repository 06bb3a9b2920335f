"""Pieces that objectives share: sums by segment, the NLL terms, the picks beside the pool.

Legend: R rows, S row length, M segments. Log-probs are in nats.
"""

from __future__ import annotations

import torch

from megatron_sip.config_objective import GrpoObjective, PairObjective
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


def segment_means(values_RS: torch.Tensor, rows: TrainRows) -> torch.Tensor:
    """Mean of `values_RS` over each segment's label positions. Returns float[M]."""
    return segment_sums(values_RS, rows) / segment_lengths(rows).clamp(min=1)


def nll_term(
    logprobs_RS: torch.Tensor, rows: TrainRows, *, role: Role, name: str, weight: float
) -> LossTerm:
    """Negative log-likelihood of the live segments of one role (method 5.1).

        sum = -sum_m w_m sum_t log pi_mt,   count = sum of lengths where w_m > 0

    Args:    logprobs_RS: float[R, S], nats, of each row's labels under the policy.
             name: of the term; its metric is objective/NAME. weight: in the loss.
    Returns: the term; its sum in nats, its count in tokens.
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


def side_picks(settings: PairObjective | GrpoObjective) -> tuple[Pick, ...]:
    """Original suffix and prefix, where the recipe trains on them beside the objective."""
    suffix = (Pick(ORIGINAL_SUFFIX, "target", 0.0, 1.0),) if settings.suffix_weight > 0 else ()
    return (*suffix, *prefix_pick(settings.prefix_weight))


def side_terms(
    logprobs_RS: torch.Tensor, rows: TrainRows, settings: PairObjective | GrpoObjective
) -> tuple[LossTerm, ...]:
    """NLL on the original suffix, the chosen candidates and the prefix, where their weight is > 0.

    Each is a term of its own: divided by its own global count of tokens (method 5.7).

    Args: logprobs_RS: float[R, S], nats, of each row's labels under the policy.
    """
    chosen_weight = settings.chosen_weight if isinstance(settings, PairObjective) else 0.0
    sides: tuple[tuple[Role, str, float], ...] = (
        ("target", "suffix_nll", settings.suffix_weight),
        ("chosen", "chosen_nll", chosen_weight),
        ("prefix", "prefix_nll", settings.prefix_weight),
    )
    return tuple(
        nll_term(logprobs_RS, rows, role=role, name=name, weight=weight)
        for role, name, weight in sides
        if weight > 0
    )


def total_loss(terms: tuple[LossTerm, ...], global_counts: dict[str, float]) -> torch.Tensor:
    """Sum over terms of weight x sum / global count; a term whose global count is 0 is 0."""
    parts = [t.sum * (t.weight / max(global_counts[t.name], 1.0)) for t in terms]
    return torch.stack(parts).sum()
