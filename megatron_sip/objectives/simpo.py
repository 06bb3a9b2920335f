"""SimPO: pairs by their mean log-probs, without a reference (method 5.7; arXiv 2405.14734, eq. 6).

    s(y) = (1 / |y|) log pi(y|p)
    L = -log sigmoid(beta (s(y+) - s(y-)) - gamma)

Legend: R rows, S row length, M segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_sip.config_objective import SimpoObjective
from megatron_sip.objectives.pairs import pair_term
from megatron_sip.objectives.terms import segment_means, side_terms
from megatron_sip.types import LossTerm, TrainRows


def loss(
    logprobs_RS: torch.Tensor, rows: TrainRows, settings: SimpoObjective
) -> tuple[LossTerm, ...]:
    """SimPO over live pairs, plus optional NLL on suffix, chosen candidates and prefix.

    Args:    logprobs_RS: float32[R, S], nats, of each row's labels under the policy.
    Returns: term "simpo", whose count is live pairs, then the terms of `terms.side_terms`.
    """

    def loss_of(margin_Q: torch.Tensor) -> torch.Tensor:
        return F.softplus(settings.gamma - settings.beta * margin_Q)

    means_M = segment_means(logprobs_RS, rows)
    term = pair_term("simpo", means_M, rows, loss_of=loss_of, score="logprob")
    return (term, *side_terms(logprobs_RS, rows, settings))
