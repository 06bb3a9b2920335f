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


def in_this_layout(loaded: dict[Any, Any], optimizer: Any) -> dict[Any, Any]:
    """Loaded optimizer state as `optimizer` wants it.

    Where experts are spread, Megatron-Core gives them an optimizer of their own: the states of
    both then stand under 0 and 1, else there is one, without a number. Tensors came to where this
    layout has them; settings and step counts stand where the saving layout had them, if that was
    the other form.
    """
    numbers = sorted(key for key in loaded if isinstance(key, int))
    if len(numbers) in (0, len(loaded)):
        return loaded
    numbered = [loaded[key] for key in numbers]
    unnumbered = {key: value for key, value in loaded.items() if key not in numbers}
    parts = optimizer.chained_optimizers
    was, now = ([unnumbered], numbered) if len(parts) > 1 else (numbered, [unnumbered])
    groups = {_kind(g): g for state in was for g in state["optimizer"]["param_groups"]}
    for state, part in zip(now, parts, strict=True):
        state |= {key: was[0][key] for key in was[0].keys() - state.keys()}
        state["optimizer"] = {"param_groups": [
            groups[_kind(mine)] | {"is_expert_parallel": mine["is_expert_parallel"]}
            for mine in part.optimizer.param_groups
        ]}  # fmt: skip
    return dict(zip(numbers, now, strict=True)) if len(parts) > 1 else unnumbered


def _kind(group: dict[str, Any]) -> tuple[float, float]:
    """What parameter groups are told apart by, whoever's they are."""
    return group["wd_mult"], group["lr_mult"]
