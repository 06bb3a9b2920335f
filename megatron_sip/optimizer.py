"""Megatron-Core's distributed Adam and learning-rate schedule, from the recipe."""

from __future__ import annotations

from typing import Any

from megatron_sip.config import Optimizer
from megatron_sip.model import Policy
from megatron_sip.platform import Platform


def build_optimizer(policy: Policy, settings: Optimizer, platform: Platform) -> Any:
    """AdamW whose state is sharded over data-parallel ranks."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            use_distributed_optimizer=True,
            overlap_param_gather=settings.overlap_param_gather,
            **platform.optimizer_config_fields(),
        ),
        [policy.ddp],
    )
    policy.config.finalize_model_grads_func = finalize_model_grads
    policy.config.grad_scale_func = optimizer.scale_loss
    if settings.overlap_grad_reduce:
        policy.config.no_sync_func = policy.ddp.no_sync
    return optimizer


def build_scheduler(optimizer: Any, settings: Optimizer, *, steps: int) -> Any:
    """Linear warm-up from 0 to `lr`, then `decay_style` to `min_lr` at the last step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=settings.decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
