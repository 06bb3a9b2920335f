"""How far the trainer's log-probs are from the engine's on the same rollouts, and the limits. Pure.

The gap of a token is log pi_trainer - log pi_engine, in nats, for weights that both should hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_sip.config import Rollout


@dataclass(frozen=True)
class MismatchLimits:
    """Largest values that a step may show; infinity: not limited."""

    mean: float = math.inf
    """Nats; of one replica's tokens, so that many good ones do not hide a bad one."""
    p99: float = math.inf
    maximum: float = math.inf
    kl: float = math.inf
    """Nats a token; like the two before, of all ranks' tokens together."""

    @property
    def need_all_ranks(self) -> bool:
        return min(self.p99, self.maximum, self.kl) < math.inf


def limits_of(rollout: Rollout | None) -> MismatchLimits:
    """Limits of a recipe; none where it has no rollout engine."""
    if rollout is None:
        return MismatchLimits()
    others = (rollout.max_logprob_mismatch_p99, rollout.max_logprob_mismatch_max, rollout.max_kl)
    return MismatchLimits(
        rollout.max_logprob_mismatch, *(math.inf if x is None else x for x in others)
    )


def mismatch_metrics(gaps_T: np.ndarray) -> dict[str, float]:
    """Mean, 99th percentile and maximum of |gap|, and the KL from engine to trainer.

        KL(engine || trainer) ~ mean(exp(gap) - 1 - gap)      k3, on tokens the engine sampled

    Args:    gaps_T: float32[T], nats.
    Returns: by metric; empty without a token.
    """
    if not len(gaps_T):
        return {}
    gaps_T = gaps_T.astype(np.float64)
    size_T = np.abs(gaps_T)
    with np.errstate(over="ignore"):
        kl = float(np.mean(np.expm1(gaps_T) - gaps_T))
    return {
        "rollout/logprob_mismatch": float(size_T.mean()),
        "rollout/logprob_mismatch_p99": float(np.quantile(size_T, 0.99)),
        "rollout/logprob_mismatch_max": float(size_T.max()),
        "rollout/kl": kl,
    }


def broken_limit(metrics: dict[str, float], limits: MismatchLimits) -> str | None:
    """What is beyond which key of the recipe, or None.

    Args: metrics: of `mismatch_metrics` over all ranks; NaN is beyond every limit.
    """
    rules = (
        ("rollout/logprob_mismatch_p99", limits.p99, "max_logprob_mismatch_p99", "nats"),
        ("rollout/logprob_mismatch_max", limits.maximum, "max_logprob_mismatch_max", "nats"),
        ("rollout/kl", limits.kl, "max_kl", "nats a token"),
    )
    for name, limit, key, unit in rules:
        value = metrics.get(name, 0.0)
        if math.isfinite(limit) and not value <= limit:
            return f"{name} is {value:.3g} {unit}, rollout.{key} is {limit:.3g}"
    return None
