"""One optimizer step from rows: reference, loss, gradients, checks, update.

The gradient of the step is d/dtheta sum_k weight_k x sum_k / count_k, every count over all
micro-batches and data-parallel ranks. Megatron divides the summed gradients by the summed token
counts, so each micro-batch's loss is scaled by the global number of scored tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megatron_sip.config_objective import Objective, needs_reference
from megatron_sip.errors import RunFailed
from megatron_sip.forward import MicroLoss, forward_backward, with_reference
from megatron_sip.mismatch import MismatchLimits, broken_limit, mismatch_metrics
from megatron_sip.model import Policy
from megatron_sip.objectives import OBJECTIVES
from megatron_sip.objectives.terms import total_loss
from megatron_sip.parallel import Ranks, concatenated, maximum, sum_over_data_parallel
from megatron_sip.platform import DETERMINISTIC_ENVIRONMENT, Platform
from megatron_sip.types import LossTerm, TrainRows

Loss = Callable[[torch.Tensor, TrainRows, Any], tuple[LossTerm, ...]]
Means = dict[str, tuple[float, float]]  # metric -> (sum, count), to be merged over ranks
TOKENS = "scored tokens"
ZERO_WHEN_EQUAL = ("objective/margin", "objective/kl_reference")  # policy and reference
ENGINE = "engine"  # in a reference's place: the log-probs that came with the rollouts
log = logging.getLogger(__name__)


class StepStopped(RunFailed):
    """A check failed before the optimizer committed; the weights are those of the last step."""


class NotFinite(StepStopped):
    """The check was that loss and gradients are finite; the step may also be skipped."""


@dataclass
class Learner:
    """Policy, optimizer and schedule of this rank."""

    policy: Policy
    optimizer: Any
    scheduler: Any
    ranks: Ranks
    platform: Platform
    limits: MismatchLimits = field(default_factory=MismatchLimits)
    num_moves: int = 0  # updates that changed the weights
    _proved: bool = False

    def learn(
        self,
        batches: Sequence[TrainRows],
        settings: Objective,
        *,
        reference: Any,
        version: int,
        fresh_reference: bool,
    ) -> tuple[Means, np.ndarray]:
        """Train on one step's micro-batches.

        Args:    reference: frozen module, ENGINE, or None when the objective needs none.
                 version: policy version that the forward pass runs with.
                 fresh_reference: reference and policy are equal, so margins must be exactly 0.
        Returns: metrics of this rank, and trainer minus engine log-probs of the rollouts that
                 the present weights made; both empty on ranks that do not report the loss.
        Raises:  StepStopped on every rank, before the optimizer commits.
        """
        if needs_reference(settings):
            batches = _with_logprobs_of(reference, batches)
        loss = OBJECTIVES[settings.name][1]
        counts = self._global_counts(batches, settings, loss)
        self.policy.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro = _micro_loss(loss, settings, counts, version)
        reports = forward_backward(self.policy.ddp, batches, micro)
        if not self.ranks.reports_loss:
            reports = []
        means = merge([r["means"] for r in reports])
        gaps = np.concatenate([np.zeros(0, np.float32), *(r["gaps"] for r in reports)])
        if means:
            means["loss"] = (means["loss"][0], 1.0 / self.ranks.dp_size)
        self._check(means, gaps, fresh_reference=fresh_reference)
        if self.platform.deterministic and not self._proved:
            self._prove_deterministic(batches, micro)
        updated, grad_norm, _ = (
            self.optimizer.step() if counts[TOKENS] else (True, 0.0, None)
        )  # without a scored token the gradient is 0, and Adam's moments must not move the weights
        if not updated or not math.isfinite(grad_norm):
            raise StepStopped(f"the optimizer refused the step: gradient norm {grad_norm}")
        lr = self.scheduler.optimizer.param_groups[0]["lr"]
        self.num_moves += bool(counts[TOKENS] and lr > 0 and grad_norm > 0)
        means |= self.pass_step()
        if self.ranks.is_main:
            means["grad_norm"] = (float(grad_norm), 1.0)
        return means, gaps

    def pass_step(self) -> Means:
        """Move the schedule on, whether the step was learned or is skipped; lr, on rank 0."""
        lr = self.scheduler.optimizer.param_groups[0]["lr"]
        self.scheduler.step(increment=1)
        return {"lr": (lr, 1.0)} if self.ranks.is_main else {}

    def _global_counts(
        self, batches: Sequence[TrainRows], settings: Objective, loss: Loss
    ) -> dict[str, float]:
        """Count of each term and of scored tokens over all ranks, from the rows alone."""
        local: dict[str, float] = {TOKENS: 0.0}
        for rows in batches:
            local[TOKENS] += int(_live_labels(rows).sum())
            for term in loss(torch.zeros_like(rows.rollout_logprobs), rows, settings):
                local[term.name] = local.get(term.name, 0.0) + float(term.count)
        totals = sum_over_data_parallel(list(local.values()), self.platform)
        return dict(zip(local, totals, strict=True))

    def _prove_deterministic(self, batches: Sequence[TrainRows], micro: MicroLoss) -> None:
        """Compute the gradients once more: the same bits, or StepStopped on every rank."""
        once = [buffer.grad_data.clone() for buffer in self.policy.grad_buffers]
        self.policy.ddp.zero_grad_buffer()
        forward_backward(self.policy.ddp, batches, micro)
        pairs = zip(once, self.policy.grad_buffers, strict=True)
        differs = sum(int((a != b.grad_data).sum()) for a, b in pairs)
        if maximum(float(differs), self.platform) > 0:
            raise StepStopped(
                f"platform.deterministic is true, but the same update gave {differs} other "
                "gradient values on this rank; a kernel of this installation varies: turn the mode "
                "off, or find it (objective.row_layout and platform.fp8 first)"
            )
        self._proved = True
        log.info(
            "deterministic: the first update gave the same bits twice; PyTorch refuses kernels "
            "that vary, and %s are set",
            ", ".join(f"{k}={v}" for k, v in DETERMINISTIC_ENVIRONMENT.items()),
        )

    def _check(self, means: Means, gaps: np.ndarray, *, fresh_reference: bool) -> None:
        """Agree over all ranks that this step may be committed."""
        loss = means.get("loss", (0.0, 1.0))[0]
        norm = sum(float(buffer.grad_data.norm()) for buffer in self.policy.grad_buffers)
        if math.isinf(maximum(abs(loss) + norm, self.platform)):
            raise NotFinite(
                f"loss or gradients are not finite (this rank: loss {loss}, gradient norm {norm}); "
                "no weight was changed; lower optimizer.lr, or look at what this step learned from"
            )
        mismatch = maximum(float(np.abs(gaps).mean()) if len(gaps) else 0.0, self.platform)
        broken = None
        if self.limits.need_all_ranks:
            broken = broken_limit(mismatch_metrics(concatenated(gaps)), self.limits)
        if mismatch > self.limits.mean:
            broken = (
                f"they differ by {mismatch:.3g} nats a token on average, "
                f"rollout.max_logprob_mismatch is {self.limits.mean:.3g}"
            )
        if broken is not None:
            raise StepStopped(
                f"trainer and rollout engine disagree on the rollouts: {broken}; the engine holds "
                "other weights or computes otherwise: look at dtype, attention backend and the "
                "last weight exchange"
            )
        gap = 0.0
        if fresh_reference:
            gap = sum(abs(means.get(name, (0.0, 0.0))[0]) for name in ZERO_WHEN_EQUAL)
        if maximum(gap, self.platform) > 0:
            raise StepStopped(
                f"policy and reference hold the same weights, but margins or KL sum to {gap:.3g} "
                "instead of 0: they are not scored by the same numerics"
            )


def _with_logprobs_of(reference: Any, batches: Sequence[TrainRows]) -> list[TrainRows]:
    """Fill `reference_logprobs` from a module or, for ENGINE, from what came with the rollouts."""
    assert reference is not None, "the objective needs a reference"
    if reference == ENGINE:
        return [replace(b, reference_logprobs=b.rollout_logprobs) for b in batches]
    return with_reference(reference, batches)


def _live_labels(rows: TrainRows) -> torch.Tensor:
    """bool[R, S]: labels in segments of weight > 0."""
    live = torch.cat([rows.weights > 0, rows.weights.new_zeros(1, dtype=torch.bool)])
    return live[rows.segment_ids.long()]  # index -1 is the appended False


def _micro_loss(
    loss: Loss, settings: Objective, counts: dict[str, float], version: int
) -> MicroLoss:
    """Loss of one micro-batch in Megatron's terms, with its report."""

    def micro(logprobs_RS: torch.Tensor, entropy_RS: torch.Tensor, rows: TrainRows) -> Any:
        terms = loss(logprobs_RS, rows, settings)
        scaled = total_loss(terms, counts)
        means: Means = {"loss": (float(scaled.detach()), 0.0)}
        for term in terms:
            means |= {k: (float(v[0]), float(v[1])) for k, v in term.metrics.items()}
        live_RS = _live_labels(rows)
        tokens = live_RS.sum().int()
        means["objective/entropy"] = (float(entropy_RS[live_RS].sum()), float(tokens))
        report = {"means": means, "gaps": engine_gaps(logprobs_RS.detach(), rows, version)}
        return scaled * counts[TOKENS], tokens, report

    return micro


def engine_gaps(logprobs_RS: torch.Tensor, rows: TrainRows, version: int) -> np.ndarray:
    """Trainer minus engine log-probs, nats, on rollouts made by weights `version`; float32[T]."""
    current = torch.cat([rows.policy_versions == version, rows.roles.new_zeros(1).bool()])
    mask_RS = current[rows.segment_ids.long()]
    return (logprobs_RS - rows.rollout_logprobs)[mask_RS].float().cpu().numpy()


def merge(parts: Sequence[Means]) -> Means:
    """Add up (sum, count) pairs by name."""
    total: Means = {}
    for part in parts:
        for name, (value, count) in part.items():
            old = total.get(name, (0.0, 0.0))
            total[name] = (old[0] + value, old[1] + count)
    return total
