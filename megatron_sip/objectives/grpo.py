"""GRPO on all rollouts of a pool (method 5.6; arXiv 2402.03300, equation 3).

    A_g    = (r_g - mean r) / (std r + 1e-6)                  or r_g - mean r (arXiv 2503.20783)
    rho_gt = exp(log pi(o_gt) - log mu(o_gt))                 mu: the engine that sampled o_g
    L      = -mean_g (1 / |o_g|) sum_t min(rho A, clip(rho, 1 - c, 1 + c) A)
             + lambda mean_g (1 / |o_g|) sum_t k3_gt
    k3     = exp(log ref - log pi) - (log ref - log pi) - 1   estimates KL(pi || ref)

Only rollouts enter: the policy did not sample suffix and rewrite, which have no ratio. Mean and std
run over the pool's valid rollouts; the std is that of the population (divided by n, not n - 1), so
that the squares of a pool's advantages have mean 1 whatever n is, and two rollouts get +1 and -1.

Legend: R rows, S row length, M segments, G valid rollouts of one pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sip.config_objective import GrpoObjective
from megatron_sip.objectives.terms import (
    ORIGINAL_SUFFIX,
    segment_lengths,
    segment_sums,
    side_picks,
    side_terms,
)
from megatron_sip.types import ROLES, CandidatePool, LossTerm, Pick, PoolRewards, TrainRows

EPSILON = 1e-6  # reward units
DEAD = Pick(ORIGINAL_SUFFIX, "sample", 0.0, 0.0)  # keeps the row of a pool without rollouts


def advantages_of(rewards_G: np.ndarray, settings: GrpoObjective) -> np.ndarray | None:
    """Advantages of one group.

    Args:    rewards_G: finite rewards of its members.
    Returns: float64[G], no unit ("standardized") or reward units ("centered"); None where there
             is nothing to compare: fewer than two members, or all of one reward.
    """
    if len(rewards_G) < 2 or rewards_G.min() == rewards_G.max():
        return None
    centered_G = rewards_G.astype(np.float64) - rewards_G.mean(dtype=np.float64)
    if settings.advantage == "centered":
        return centered_G
    return centered_G / (np.sqrt(np.mean(centered_G**2)) + EPSILON)


def select(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: GrpoObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """Every rollout with its advantage; those without a valid reward, or contrast, are dead.

    Those that a gate stops count as the worst that passes, unless their reward is smaller still,
    and are never made likelier; where none passes the pool is dead.

    Returns: for each pool its rollouts in the pool's order (one dead pick where it has none), then
             the suffix and the prefix if the recipe trains on them.
    """
    picks = []
    for pool, reward in zip(pools, rewards, strict=True):
        members = [i for i, c in enumerate(pool.candidates) if c.source == "rollout"]
        valid = [i for i in members if reward.valid[i]]
        found = advantages_of(_gated(reward, valid), settings)
        live = dict(zip(valid, found, strict=True)) if found is not None else {}
        live = {i: a if reward.passes[i] else min(a, 0.0) for i, a in live.items()}
        samples = [Pick(i, "sample", float(live.get(i, 0.0)), float(i in live)) for i in members]
        picks.append((*(samples or [DEAD]), *side_picks(settings)))
    return picks


def _gated(reward: PoolRewards, members: Sequence[int]) -> np.ndarray:
    """Totals of these members, none above a gate's; empty if no member passes."""
    total, passes = reward.total[members], reward.passes[members]
    if not passes.any():
        return total[:0]
    return np.where(passes, total, np.minimum(total, total[passes].min()))


def loss(
    logprobs_RS: torch.Tensor, rows: TrainRows, settings: GrpoObjective
) -> tuple[LossTerm, ...]:
    """Clipped policy gradient on live samples, the KL to the reference, and the terms beside.

    Args:    logprobs_RS: float32[R, S], nats, of each row's labels under the policy; the engine's
             are in `rows.rollout_logprobs`, the reference's in `rows.reference_logprobs`.
    Returns: terms "grpo" and, if kl_weight > 0, "kl_reference", whose counts are live samples,
             then those of `terms.side_terms`.
    """
    live_M = rows.weights * (rows.roles == ROLES.index("sample"))
    index_RS = rows.segment_ids.long()  # -1 is the appended 0
    live_RS = torch.cat([live_M, live_M.new_zeros(1)])[index_RS] > 0
    advantage_RS = torch.cat([rows.advantages, rows.advantages.new_zeros(1)])[index_RS]
    ratio_RS = torch.where(live_RS, logprobs_RS - rows.rollout_logprobs, 0.0).exp()
    clipped_RS = ratio_RS.clamp(1 - settings.clip, 1 + settings.clip)
    surrogate_RS = torch.minimum(ratio_RS * advantage_RS, clipped_RS * advantage_RS)
    bound_RS = clipped_RS * advantage_RS < ratio_RS * advantage_RS

    terms = [sample_term("grpo", -surrogate_RS, live_M, rows, settings, weight=1.0)]
    for metric, values_RS in (("ratio", ratio_RS.detach()), ("clip_fraction", bound_RS.float())):
        pair = torch.stack([values_RS[live_RS].sum(), live_RS.sum().to(values_RS.dtype)])
        terms[0].metrics[f"objective/{metric}"] = pair
    if settings.kl_weight > 0:
        gap_RS = torch.where(live_RS, rows.reference_logprobs - logprobs_RS, 0.0)
        k3_RS, weight = gap_RS.expm1() - gap_RS, settings.kl_weight
        terms.append(sample_term("kl_reference", k3_RS, live_M, rows, settings, weight=weight))
    return (*terms, *side_terms(logprobs_RS, rows, settings))


def sample_term(
    name: str,
    values_RS: torch.Tensor,
    live_M: torch.Tensor,
    rows: TrainRows,
    settings: GrpoObjective,
    *,
    weight: float,
) -> LossTerm:
    """sum over live samples of (1 / divisor) sum_t values, the divisor |o_g| or `token_divisor`.

    Args:    values_RS: float[R, S], a token. live_M: float[M], 1 where a sample is live.
    Returns: the term; its count in live samples.
    """
    divisor_M = segment_lengths(rows).clamp(min=1)
    if settings.token_divisor is not None:
        divisor_M = torch.full_like(divisor_M, settings.token_divisor)
    total = (live_M * segment_sums(values_RS, rows) / divisor_M).sum()
    count = (live_M > 0).sum()
    metric = torch.stack([total.detach(), count.to(total.dtype)])
    return LossTerm(name, total, count, weight, {f"objective/{name}": metric})
