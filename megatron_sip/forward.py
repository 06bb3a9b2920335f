"""Rows -> per-token log-probs, the one seam for policy and reference alike; and the pipeline step.

Log-probs are minus the NLL that SipGPTModel returns for given labels: by our own loss head, right
under tensor parallelism without gathering the vocabulary, fp32, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_sip.supervision.heartbeat import HEART
from megatron_sip.types import TrainRows

MicroLoss = Callable[
    [torch.Tensor, torch.Tensor, TrainRows], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]
]
"""(log-probs float32[R, S], entropy float32[R, S] without gradient, rows) -> (loss with gradient,
int32 token count, report)."""


def _forward(model: Any, rows: TrainRows, *, with_entropy: bool) -> Any:
    """NLL float32[R, S] of the labels on the last stage, or (NLL, entropy); hidden states before.
    """  # fmt: skip
    HEART.beat()
    return model(
        input_ids=rows.tokens,
        position_ids=rows.position_ids.expand(3, -1, -1),
        attention_mask=rows.branch_ids if rows.branch_ids.numel() else None,
        labels=rows.labels,
        with_entropy=with_entropy,
    )


def _run(
    models: Any,
    batches: Sequence[TrainRows],
    step: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Send the micro-batches through Megatron's schedule; reports of the last stage."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    num_rows, length = batches[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[models],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=num_rows,
        forward_only=forward_only,
    )


def token_logprobs(model: Any, batches: Sequence[TrainRows]) -> list[torch.Tensor]:
    """Log-probs of every label, without gradient.

    Args:    model: policy (bare or wrapped) or reference; it stays in its mode.
             batches: micro-batches of one shape.
    Returns: for each micro-batch float32[R, S], nats; empty on all but the last stage.
    """

    def step(iterator: Any, module: Any) -> tuple[torch.Tensor, Any]:
        def report(nll: torch.Tensor) -> Any:
            zero = nll.new_zeros(())
            return zero, zero.int(), {"logprobs": -nll.float()}

        return _forward(module, next(iterator), with_entropy=False), report

    with torch.no_grad():
        reports = _run(model, batches, step, forward_only=True)
    return [r["logprobs"] for r in reports]


def with_reference(reference: Any, batches: Sequence[TrainRows]) -> list[TrainRows]:
    """Fill `reference_logprobs` (only the last stage uses them)."""
    logprobs = token_logprobs(reference, batches)
    if not logprobs:
        return list(batches)
    return [replace(b, reference_logprobs=lp) for b, lp in zip(batches, logprobs, strict=True)]


def forward_backward(policy: Any, batches: Sequence[TrainRows], loss: MicroLoss) -> list[Any]:
    """Accumulate gradients of `loss` over the micro-batches.

    Megatron divides the summed gradients by the summed counts over data parallel
    (`calculate_per_token_loss`), so `loss` must be scaled to that.

    Returns: the reports of `loss`, in order; empty on all but the last stage.
    """

    def step(iterator: Any, module: Any) -> tuple[torch.Tensor, Any]:
        rows = next(iterator)
        output = _forward(module, rows, with_entropy=True)
        if not isinstance(output, tuple):  # hidden states, for the next stage
            return output, None
        nll, entropy = output
        return nll, partial(_apply, loss, rows, entropy)

    return _run(policy, batches, step, forward_only=False)


def _apply(loss: MicroLoss, rows: TrainRows, entropy: torch.Tensor, nll: torch.Tensor) -> Any:
    return loss(-nll.float(), entropy, rows)
