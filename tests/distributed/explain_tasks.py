"""One real step of a recipe with everything about it measured: tensors, FLOPs, activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from workers import Context

from megatron_sip.config import Config
from megatron_sip.learner import Learner
from megatron_sip.model import (
    build_module,
    frozen_copy,
    initialize_randomly,
    is_spread,
    transformer_config,
    wrap_data_parallel,
)
from megatron_sip.objectives import OBJECTIVES
from megatron_sip.optimizer import build_optimizer, build_scheduler
from megatron_sip.parallel import shard
from megatron_sip.rows import make_micro_batches, row_length
from megatron_sip.types import Candidate, CandidatePool, PoolRewards, SipSample, TrainRows


def as_it_is(count: Any) -> Any:
    """A count that the counter's table holds already; it would take tensors' shapes twice."""

    def counted(*args: Any, **named: Any) -> int:
        return count(*args, **named)

    counted._get_raw = True  # type: ignore[attr-defined]
    return counted


ATTENTION = {  # the counter knows the GPU's kernels; of the CPU's the shapes are the same
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: as_it_is(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: as_it_is(
        sdpa_backward_flop
    ),
}


def learner_of(ctx: Context, config: Config, vocab_size: int) -> Learner:
    """What the recipe trains, with random weights."""
    model_config = transformer_config(config.model, config.parallel, ctx.platform)
    module = build_module(model_config, config.model, ctx.platform, vocab_size=vocab_size)
    initialize_randomly(module, config.model, seed=1)
    policy = wrap_data_parallel(model_config, module, config.optimizer, ctx.platform)
    optimizer = build_optimizer(policy, config.optimizer, ctx.platform)
    scheduler = build_scheduler(optimizer, config.optimizer, steps=config.run.steps)
    return Learner(policy, optimizer, scheduler, ctx.ranks, ctx.platform)


def measured_step(ctx: Context, config: Config, vocab_size: int) -> dict[str, Any]:
    """Bytes and FLOPs of this rank in the recipe's first optimizer step, with frozen reference."""
    learner = learner_of(ctx, config, vocab_size)
    policy, module, optimizer = learner.policy, learner.policy.module, learner.optimizer
    frozen = frozen_copy(policy, config, ctx.platform, vocab_size=vocab_size)
    own = {b.param_data.untyped_storage().data_ptr() for b in policy.grad_buffers}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that none is reused
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with saved_tensors_hooks(keep, lambda tensor: tensor), counter as flops:
        learner.learn(
            micro_batches(ctx, config, vocab_size), config.objective, reference=frozen, version=0,
            fresh_reference=False,
        )  # fmt: skip
    state = list(optimizer_tensors(optimizer))
    return {
        "place": (ctx.ranks.tp_rank, ctx.ranks.pp_rank, ctx.ranks.dp_rank),
        "parts": parts(module),
        "spread": sum(p.numel() for p in module.parameters() if is_spread(p)),
        "weights": sum(b.param_data.nbytes for b in policy.grad_buffers),
        "gradients": sum(b.grad_data.nbytes for b in policy.grad_buffers),
        "optimizer": storage_bytes(state, without=own),
        "start_policy": storage_bytes(frozen.parameters(), without=set()),
        "activations": storage_bytes(saved.values(), without=own),
        "flops": flops.get_total_flops(),
    }


def parts(module: Any) -> dict[str, int]:
    """Real parameters by part, told by what their names hold."""
    found = dict.fromkeys(("embedding", "attention", "mlp", "experts", "norms", "head"), 0)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            part = "norms"
        elif name.startswith("embedding"):
            part = "embedding"
        elif name.startswith("output_layer"):
            part = "head"
        elif ".experts." in name:
            part = "experts"
        else:
            part = "mlp" if ".mlp." in name else "attention"
        found[part] += parameter.numel()
    return found


def optimizer_tensors(optimizer: Any) -> Iterable[torch.Tensor]:
    """Moments and main weights of Megatron's distributed optimizer."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in one.optimizer.param_groups:
            yield from group["params"]
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def storage_bytes(tensors: Iterable[torch.Tensor], *, without: set[int]) -> int:
    """Bytes of the distinct storages behind `tensors`, less those at addresses in `without`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(nbytes for address, nbytes in storages.items() if address not in without)


def micro_batches(ctx: Context, config: Config, vocab_size: int) -> list[TrainRows]:
    """This replica's rows: full prefixes, full candidates, pools with contrast."""
    data, rng = config.data, np.random.default_rng(3)
    count = config.rollout.num_rollouts if config.rollout else 0

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocab_size, length).astype(np.int32)

    pools, rewards, order = [], [], []
    for i in shard(data.global_batch_size, ctx.ranks):
        sample = SipSample(int(i), 0, 0, ids(data.prefix_tokens), ids(data.suffix_tokens))
        none = np.zeros(0, np.float32)
        rollouts = [
            Candidate("rollout", ids(data.suffix_tokens), "r", none, -5, "length")
            for _ in range(count)
        ]
        pools.append(CandidatePool(sample, "p", tuple(rollouts), 1.0))
        total = np.arange(count, dtype=np.float32)
        rewards.append(PoolRewards({}, total, np.ones(count, bool), 0, np.ones(count, bool)))
        order.append(list(range(count)))
    picks = OBJECTIVES[config.objective.name][0](pools, rewards, config.objective, order)
    length = row_length(data.prefix_tokens, data.suffix_tokens, 1)
    batches = make_micro_batches(
        pools,
        picks,
        micro_batch_size=data.micro_batch_size,
        length=length,
        multiple=1,
        pad=0,
        layout=config.objective.row_layout,
    )
    device = ctx.platform.device
    return [replace(b, **{n: t.to(device) for n, t in vars(b).items()}) for b in batches]
