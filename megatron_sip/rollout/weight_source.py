"""The trainer's weights as a stream of full Hugging Face tensors on global rank 0.

Layer by layer: gathered over tensor parallel inside the owning stage, handed to rank 0 over the
pipeline; the whole model is never in one place. Structurally vLLM's `WeightSource`; it imports
nothing of vLLM, so the CPU trainer need not load it (`weight_transfer.py` adapts it for NCCL).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.config import Model
from megatron_sip.convert.names import Entry, name_table, stage_of
from megatron_sip.model import Policy, global_name
from megatron_sip.parallel import Ranks
from megatron_sip.platform import Platform


@dataclass(frozen=True)
class TensorInfo:
    """What iteration will yield."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class MegatronWeightSource:
    """Iterate on every rank at once; tensors are meaningful on global rank 0 only.

    Ranks of other data-parallel replicas yield nothing. `metadata()` makes no collective call.
    """

    def __init__(
        self, policy: Policy, model: Model, ranks: Ranks, platform: Platform, *, vocab_size: int
    ) -> None:
        self._policy, self._model, self._ranks, self._platform = policy, model, ranks, platform
        self._table = name_table(model, vocab_size=vocab_size)

    def metadata(self) -> list[TensorInfo]:
        """Name, dtype and full shape of every tensor, in the order of iteration."""
        dtype = self._platform.params_dtype
        return [
            TensorInfo(name, dtype, shape)
            for entry in self._table
            for name, shape in zip(entry.names, entry.shapes, strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Fresh pass over the current weights.

        Waits for side streams and forces the parameter gather first: with an overlapped gather
        the optimizer's new values would else arrive only at the next forward.
        """
        self._platform.synchronize()
        self._policy.ddp.start_param_sync(force_sync=True)
        if self._ranks.dp_rank != 0:
            return
        local = {global_name(n, self._policy.module): p
                 for n, p in self._policy.module.named_parameters()}  # fmt: skip
        for entry in self._table:
            full = self._gather(entry, local)
            if full is None:
                continue
            parts = entry.split(full, self._model)
            for name, shape, tensor in zip(entry.names, entry.shapes, parts, strict=True):
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name}: gathered {tuple(tensor.shape)}, expected {shape}")
                yield name, tensor.contiguous()

    def _gather(self, entry: Entry, local: dict[str, torch.nn.Parameter]) -> torch.Tensor | None:
        """Full Megatron tensor of an entry on rank 0, None elsewhere."""
        from megatron.core import parallel_state

        stage = stage_of(entry, self._model, pipeline_size=self._ranks.pp_size)
        full = None
        if self._ranks.pp_rank == stage:
            found = [local[name] for name in entry.megatron if name in local]
            if len(found) != 1:
                raise ValueError(
                    f"stage {stage} holds {len(found)} of {entry.megatron}; exactly one is needed"
                )
            full = self._join(entry, found[0].detach())
        if stage == 0:
            return full if self._ranks.is_main else None
        if self._ranks.tp_rank != 0:
            return None
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        if self._ranks.pp_rank == stage:
            assert full is not None
            dist.send(full.contiguous(), dst=0, group=group)
        elif self._ranks.is_main:
            shape = _joined_shape(entry)
            full = torch.empty(
                shape, dtype=self._platform.params_dtype, device=self._platform.device
            )
            source = dist.get_global_rank(group, stage)
            dist.recv(full, src=source, group=group)
            return full
        return None

    def _join(self, entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
        """All tensor-parallel slices of this stage, joined."""
        from megatron.core import parallel_state

        size = parallel_state.get_tensor_model_parallel_world_size()
        if entry.gather_dim is None or size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(
            parts, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
        )
        return entry.join(parts)


def _joined_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of the full Megatron tensor: its Hugging Face parts stacked along dimension 0."""
    return (sum(shape[0] for shape in entry.shapes), *entry.shapes[0][1:])
