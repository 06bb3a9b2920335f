"""Process groups, who does what among ranks, and the few collectives the step needs.

Ranks are laid out tp-cp-ep-dp-pp (Megatron's default). The I/O rank of a data-parallel replica is
its first tensor- and pipeline-parallel rank: it alone samples, generates and judges, and hands
finished rows to the rest of its replica.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megatron_sip.config import Parallel
from megatron_sip.config_rules import COLLECTIVE_TIMEOUT_S
from megatron_sip.platform import Platform
from megatron_sip.types import TrainRows

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)


@dataclass(frozen=True)
class Ranks:
    """This process's place."""

    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    ep_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def holds_experts(self) -> bool:
        """One of the first data-parallel replicas, which hold each expert once between them."""
        return self.dp_rank < self.ep_size

    @property
    def is_io(self) -> bool:
        """Speaks HTTP for its data-parallel replica."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def reports_loss(self) -> bool:
        """One rank a replica that holds the loss."""
        return self.tp_rank == 0 and self.is_last_stage


def initialize(settings: Parallel, platform: Platform, *, seed: int) -> Ranks:
    """Join the process groups of this run; torchrun must have started as many ranks."""
    from megatron.core import parallel_state, tensor_parallel

    _join(platform.backend)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        expert_model_parallel_size=settings.expert_model_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
    )


def _join(backend: str) -> None:
    """Meet the other ranks of this attempt.

    torchrun may keep one store over its restarts, which holds the addresses of ranks that died, so
    every attempt has names of its own there.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def broadcast_object(value: Any, *, src: int = 0, group: Any = None) -> Any:
    """`value` of global rank `src` on every rank of `group`."""
    box = [value]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def share(value: Any) -> Any:
    """The I/O rank's `value` on every rank of its model-parallel replica."""
    from megatron.core import parallel_state

    return broadcast_object(
        value,
        src=parallel_state.get_model_parallel_src_rank(),
        group=parallel_state.get_model_parallel_group(),
    )


def broadcast_rows(
    batches: Sequence[TrainRows] | None, ranks: Ranks, platform: Platform
) -> list[TrainRows]:
    """The I/O rank's micro-batches on every rank of its model-parallel replica.

    Args:    batches: micro-batches of this replica on the I/O rank, None elsewhere.
    Returns: the same micro-batches on `platform.device`.
    """
    from megatron.core import parallel_state

    group: Any = parallel_state.get_model_parallel_group()
    src = parallel_state.get_model_parallel_src_rank()
    names = [f.name for f in fields(TrainRows)]
    shapes = None
    if ranks.is_io:
        assert batches is not None
        shapes = [
            {n: (tuple(getattr(b, n).shape), getattr(b, n).dtype) for n in names} for b in batches
        ]
    shapes = share(shapes)
    received = []
    for i, layout in enumerate(shapes):
        tensors = {}
        for name in names:
            shape, dtype = layout[name]
            if ranks.is_io:
                assert batches is not None
                tensor = getattr(batches[i], name).to(platform.device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=platform.device)
            if tensor.numel():
                dist.broadcast(tensor, src=src, group=group)
            tensors[name] = tensor
        received.append(TrainRows(**tensors))
    return received


def sum_over_data_parallel(values: Sequence[float], platform: Platform) -> list[float]:
    """Element-wise float64 sum over the data-parallel group."""
    from megatron.core import parallel_state

    total = torch.tensor(values, dtype=torch.float64, device=platform.device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.tolist()


def maximum(value: float, platform: Platform) -> float:
    """Largest `value` over all ranks, so that all take the same decision; NaN counts as inf."""
    box = torch.tensor([value], dtype=torch.float64, device=platform.device)
    box = torch.nan_to_num(box, nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.item()


def shared_failure(message: str, platform: Platform) -> str:
    """The first of all ranks' messages, on every rank; "" if none has one."""
    if not maximum(float(bool(message)), platform):
        return ""
    box: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(box, message)
    return next(filter(None, box))


def concatenated(values: np.ndarray) -> np.ndarray:
    """Every rank's `values` one after the other, in rank order, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, values)
    return np.concatenate(box)


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """`value` of every rank on rank 0 (in rank order), an empty list elsewhere."""
    box: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(value, box, dst=0)
    return box or []


def shard(total: int, ranks: Ranks) -> np.ndarray:
    """Positions of `total` items that belong to this data-parallel replica (contiguous)."""
    return np.array_split(np.arange(total), ranks.dp_size)[ranks.dp_rank]
