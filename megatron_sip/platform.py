"""The hardware, as one object: device, backend, dtype, layer spec, FP8, seeds, memory.

`cpu` and `cuda` take the same code path through the rest of the package. The cuda side is tested by
`tests/gpu` on one GPU, and by `tests/unit/test_platform.py` as far as a CPU can; docs/gpus.md says
what ran where.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_sip.branch_attention import with_branch_attention
from megatron_sip.config import Fp8, PlatformConfig


@dataclass(frozen=True)
class Platform:
    """Everything that differs between a CPU and a CUDA run."""

    kind: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    device: torch.device
    params_dtype: torch.dtype
    fp8: Fp8 | None
    deterministic: bool = False

    def transformer_config_fields(self) -> dict[str, Any]:
        """Fields of Megatron-Core's TransformerConfig that the hardware decides.

        Megatron-Core checks none of the FP8 names, so our config's Literals do.
        """
        if self.kind == "cpu":
            return {
                "use_cpu_initialization": True,
                "masked_softmax_fusion": False,
                "bias_activation_fusion": False,
                "gradient_accumulation_fusion": False,
                "pipeline_dtype": self.params_dtype,
                "params_dtype": self.params_dtype,
                "deterministic_mode": self.deterministic,
            }
        fields: dict[str, Any] = {
            "use_cpu_initialization": False,
            "masked_softmax_fusion": True,
            "bias_activation_fusion": True,
            "gradient_accumulation_fusion": False,  # needs apex's fused kernels
            "pipeline_dtype": self.params_dtype,
            "params_dtype": self.params_dtype,
            "deterministic_mode": self.deterministic,
            "bf16": self.params_dtype == torch.bfloat16,
        }
        if self.fp8 is not None:
            fields |= {
                "fp8": self.fp8.format,
                "fp8_recipe": self.fp8.recipe,
                "fp8_param": self.fp8.param,
                "fp8_amax_history_len": self.fp8.amax_history_len,
                "fp8_amax_compute_algo": "max" if self.fp8.amax_history_len > 1 else "most_recent",
            }
        return fields

    def ddp_config_fields(self) -> dict[str, Any]:
        """Fields of DistributedDataParallelConfig that the hardware decides."""
        if self.fp8 is None:
            return {"grad_reduce_in_fp32": True}
        return {
            "grad_reduce_in_fp32": True,
            "fp8_param_gather": self.fp8.param,
            "reuse_grad_buf_for_mxfp8_param_ag": self.fp8.param and self.fp8.recipe == "mxfp8",
        }

    def optimizer_config_fields(self) -> dict[str, Any]:
        """Fields of OptimizerConfig that the hardware decides; it must repeat the FP8 recipe."""
        fields: dict[str, Any] = {
            "bf16": self.params_dtype == torch.bfloat16,
            "params_dtype": self.params_dtype,
        }
        if self.fp8 is not None:
            fields["fp8_recipe"] = self.fp8.recipe
            fields["reuse_grad_buf_for_mxfp8_param_ag"] = (
                self.fp8.param and self.fp8.recipe == "mxfp8"
            )
        return fields

    def token_multiple(self, *, tensor_parallel: int, sequence_parallel: bool) -> int:
        """Row lengths must be a multiple of this (FP8 tiles, sequence-parallel slices)."""
        multiple = {None: 1, "mxfp8": 32}.get(self.fp8 and self.fp8.recipe, 16)
        return multiple * (tensor_parallel if sequence_parallel else 1)

    def decoder_spec(self, config: Any) -> Any:
        """Megatron-Core layer specs of the decoder: local on CPU, Transformer Engine on CUDA.

        Both have our core attention; on CUDA rows without branches keep Transformer Engine's.
        """
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        cuda = self.kind == "cuda"
        spec = get_gpt_decoder_block_spec(
            config=config, use_transformer_engine=cuda, normalization="RMSNorm"
        )
        return with_branch_attention(spec, keep_causal=cuda)

    def synchronize(self) -> None:
        """Wait for all device work, side streams included (before weights are exported)."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def device_name(self) -> str:
        """What the driver calls this rank's accelerator; "" on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.kind == "cuda" else ""

    def peak_memory_gib(self) -> float:
        """Largest memory this process held: device memory on CUDA, resident set on CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cpu(settings: PlatformConfig) -> Platform:
    """gloo, fp32 (bf16 is ~20 times slower without AMX), local layer spec, patched Megatron."""
    from megatron_sip import mcore_patches

    mcore_patches.install()
    torch.set_num_threads(settings.num_threads)
    if settings.deterministic:
        only_deterministic_kernels()
    return Platform("cpu", "gloo", torch.device("cpu"), torch.float32, None, settings.deterministic)


def cuda(settings: PlatformConfig) -> Platform:
    """NCCL, bf16, Transformer Engine.

    Raises: ValueError if there is no GPU or no Transformer Engine.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            'platform.kind is "cuda", but torch sees no GPU; set platform.kind = "cpu" or run '
            "where nvidia-smi lists one"
        )
    import importlib.util

    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            'platform.kind is "cuda", but transformer_engine is not installed; '
            'install the "gpu" extra'
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local_rank)  # before NCCL and vLLM's trainer engine look for a device
    if settings.deterministic:
        only_deterministic_kernels()
    return Platform(
        "cuda", "nccl", torch.device("cuda", local_rank), torch.bfloat16, settings.fp8,
        settings.deterministic,
    )  # fmt: skip


DETERMINISTIC_ENVIRONMENT = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention kernels
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: one workspace a stream
    "NCCL_ALGO": "Ring",  # sums in one order
}


def only_deterministic_kernels() -> None:
    """Before anything is built: what is switched on later has no effect on what is there."""
    os.environ |= DETERMINISTIC_ENVIRONMENT
    torch.use_deterministic_algorithms(True)


def device_memory_bytes() -> int | None:
    """Memory of this rank's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory


PLATFORMS = {"cpu": cpu, "cuda": cuda}
