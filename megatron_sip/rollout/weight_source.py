"""The trainer's weights as a stream of full Hugging Face tensors on global rank 0.

Layer by layer: gathered over tensor parallel where it is held, handed over expert parallel to the
first replica and over the pipeline to rank 0; the whole model is never in one place. Structurally
vLLM's `WeightSource`; it imports nothing of vLLM, so the CPU trainer need not load it
(`weight_transfer.py` adapts it for NCCL).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.config_model import Model
from megatron_sip.convert.names import Entry, held_name, name_table, replica_of, stage_of
from megatron_sip.convert.tensor_folder import TensorInfo
from megatron_sip.model import Policy, global_name
from megatron_sip.parallel import Ranks
from megatron_sip.platform import Platform


class MegatronWeightSource:
    """Iterate on every rank at once; tensors are meaningful on global rank 0 only.

    Other ranks yield nothing, and take part where they hold something. `metadata()` makes no
    collective call.
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
        if not self._ranks.holds_experts:
            return
        local = {global_name(n, self._policy.module): p
                 for n, p in self._policy.module.named_parameters()}  # fmt: skip
        for entry in self._table:
            for name, shape, tensor in zip(
                entry.names, entry.shapes, self._gather(entry, local), strict=False
            ):
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name}: gathered {tuple(tensor.shape)}, expected {shape}")
                yield name, tensor.contiguous()

    def _gather(self, entry: Entry, local: dict[str, torch.nn.Parameter]) -> list[torch.Tensor]:
        """Hugging Face tensors of an entry on rank 0, none elsewhere."""
        from megatron.core import parallel_state

        ranks = self._ranks
        stage = stage_of(entry, self._model, pipeline_size=ranks.pp_size)
        replica = replica_of(entry, self._model, expert_size=ranks.ep_size)
        whole: list[torch.Tensor] = []
        if (ranks.pp_rank, ranks.dp_rank) == (stage, replica):
            whole = self._join(entry, local[held_name(entry, local)].detach())
        if ranks.tp_rank != 0:
            return []
        if ranks.pp_rank == stage:
            group = parallel_state.get_expert_model_parallel_group()
            whole = self._hand_over(whole, entry, group, source=replica)
        if ranks.dp_rank == 0:
            group = parallel_state.get_pipeline_model_parallel_group()
            whole = self._hand_over(whole, entry, group, source=stage)
        return whole

    def _hand_over(
        self, whole: list[torch.Tensor], entry: Entry, group: Any, *, source: int
    ) -> list[torch.Tensor]:
        """Tensors of a group's rank `source` on its first rank, none on the others."""
        if source == 0:
            return whole
        if group.rank() == source:
            for tensor in whole:
                dist.send(tensor.contiguous(), group=group, group_dst=0)
        if group.rank() != 0:
            return []
        like = {"dtype": self._platform.params_dtype, "device": self._platform.device}
        received = [torch.empty(shape, **like) for shape in entry.shapes]
        for tensor in received:
            dist.recv(tensor, group=group, group_src=source)
        return received

    def _join(self, entry: Entry, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Hugging Face tensors of an entry, from the slices of this stage's tensor-parallel ranks.
        """  # fmt: skip
        from megatron.core import parallel_state

        size = parallel_state.get_tensor_model_parallel_world_size()
        parts = [tensor]
        if entry.dim is not None and size > 1:
            parts = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(
                parts, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
            )
        slices = [entry.split(part, self._model) for part in parts]
        whole = slices[0]
        if entry.dim is not None and size > 1:
            whole = [torch.cat(of, entry.dim) for of in zip(*slices, strict=True)]
        if entry.padded:
            whole = [tensor[: shape[0]] for tensor, shape in zip(whole, entry.shapes, strict=True)]
        return whole
