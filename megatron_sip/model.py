"""Config -> SipGPTModel, its first weights, and the data-parallel wrapper."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sip.config import Config, Model, Optimizer, Parallel
from megatron_sip.platform import Platform


@dataclass(frozen=True)
class Policy:
    """The model under training."""

    config: Any  # megatron.core TransformerConfig
    module: Any  # SipGPTModel of this rank
    ddp: Any  # the same, wrapped for data parallel (and half precision on CUDA)

    @property
    def grad_buffers(self) -> list[Any]:
        """Megatron-Core's, of all parameters; experts' are apart under expert parallelism."""
        return [*self.ddp.buffers, *self.ddp.expert_parallel_buffers]


def transformer_config(model: Model, parallel: Parallel, platform: Platform) -> Any:
    """Megatron-Core TransformerConfig: RMSNorm, SwiGLU, grouped-query attention, no dropout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        perform_initialization=False,  # `initialize_randomly` does, the same for every layout
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        mrope_section=[model.head_dim // 2, 0, 0],
        apply_rope_fusion=False,  # its kernel counts positions from 0 in every row
        recompute_granularity=model.recompute_granularity,
        recompute_method="uniform" if model.recompute_granularity else None,
        recompute_num_layers=1 if model.recompute_granularity else None,
        **_expert_fields(model, platform),
        **platform.transformer_config_fields(),
    )


def _expert_fields(model: Model, platform: Platform) -> dict[str, Any]:
    """Fields of TransformerConfig for experts; tokens are never dropped.

    Megatron-Core's order is softmax over the chosen experts; `pre_softmax` is over all of them.
    """
    if model.experts is None:
        return {}
    return {
        "num_moe_experts": model.experts.num_experts,
        "moe_router_topk": model.experts.experts_per_token,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_pre_softmax": not model.experts.normalize,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": platform.kind == "cuda",
    }


def build_module(config: Any, model: Model, platform: Platform, *, vocab_size: int) -> Any:
    """SipGPTModel of this rank with uninitialised weights.

    Args: vocab_size: rows of the embedding; they are padded to what tensor parallelism divides.
    """
    from megatron.core import parallel_state

    from megatron_sip.gpt import SipGPTModel  # after the platform patched Megatron-Core

    module = SipGPTModel(
        config=config,
        transformer_layer_spec=platform.decoder_spec(config),
        vocab_size=model.padded_vocabulary(
            vocab_size, tensor_parallel=config.tensor_model_parallel_size
        ),
        max_sequence_length=model.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="mrope",  # three times the same positions: RoPE that reads them
        rotary_base=model.rotary_base,
    ).to(platform.device)
    module.unpadded_vocab_size = vocab_size
    if model.rope_scaling is not None:
        module.scale_rope(model.rope_scaling)
    mark_tensor_parallel(module)
    return module


def mark_tensor_parallel(module: Any) -> None:
    """Say which parameters are slices: the gradient norm counts unmarked ones on TP rank 0 only.

    Megatron-Core marks them where it initialises them, which `perform_initialization` turns off.
    """
    for name, parameter in module.named_parameters():
        if is_sliced(name):
            parameter.tensor_model_parallel = True
            parameter.partition_dim = int(writes_into_residual(name))
            parameter.partition_stride = 1


def is_sliced(name: str) -> bool:
    """True for what tensor parallelism slices: all matrices but the router's, and their biases."""
    return not name.endswith(("norm.weight", "layer_norm_weight", "router.weight"))


def is_spread(parameter: torch.nn.Parameter) -> bool:
    """True for an expert's under expert parallelism, as Megatron-Core marks them."""
    return not getattr(parameter, "allreduce", True)


def writes_into_residual(name: str) -> bool:
    """True for the row-parallel matrices: attention output and MLP down projection."""
    return _kind(name).endswith(("linear_proj.weight", "linear_fc2.weight"))


def _kind(name: str) -> str:
    """The name without the expert's number, which stands at the end of grouped ones."""
    return name.rstrip("0123456789")


def global_name(name: str, module: Any) -> str:
    """Parameter name with the numbers that layer and expert have in the whole model, not those in
    this pipeline stage and this expert-parallel rank."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name
    layer = module.decoder.layers[int(parts[2])]
    parts[2] = str(layer.layer_number - 1)
    if "experts" in parts:
        first = layer.mlp.local_expert_indices[0]
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            parts[at] = str(first + int(parts[at]))
        else:  # grouped
            kind = _kind(parts[-1])
            parts[-1] = f"{kind}{first + int(parts[-1].removeprefix(kind))}"
    return ".".join(parts)


def initialize_randomly(module: Any, model: Model, *, seed: int) -> None:
    """Fill the weights from (seed, global parameter name): the same model for every layout.

    Normal with `init_std`; matrices that write into the residual stream are scaled by
    1/sqrt(2 x layers); norms are one; biases and the padding of the vocabulary are zero.
    """
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for local_name, parameter in module.named_parameters():
        name = global_name(local_name, module)
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied matrix
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        into_residual = writes_into_residual(name)
        std = model.init_std / (math.sqrt(2 * model.num_layers) if into_residual else 1.0)
        dim = 1 if into_residual else 0  # row-parallel, column-parallel
        slices = tp if is_sliced(name) else 1
        shape = list(parameter.shape)
        shape[dim] *= slices
        padding = 0
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            padding = shape[0] - module.unpadded_vocab_size
            shape[0] -= padding
        words = np.frombuffer(name.encode().ljust(4 * -(-len(name) // 4)), dtype=np.uint32)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, *words.tolist()]).generate_state(1)[0])
        )
        full = torch.empty(shape, dtype=torch.float32, device="cpu")
        full.normal_(0.0, std, generator=generator)
        if padding:
            full = torch.nn.functional.pad(full, (0, 0, 0, padding))
        if _kind(name).endswith("linear_fc1.weight"):  # a rank holds its slice of gate, then of up
            gate, up = full.chunk(2)
            local = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        else:
            local = full.chunk(slices, dim)[rank % slices]
        parameter.data.copy_(local)


def wrap_data_parallel(
    config: Any, module: Any, optimizer: Optimizer, platform: Platform
) -> Policy:
    """Megatron's DistributedDataParallel over the module, sharded for its optimizer."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.transformer.module import Float16Module

    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        check_for_nan_in_grad=False,  # would raise on one rank and hang the others; learner checks
        **platform.ddp_config_fields(),
    )
    inner = module if platform.params_dtype == torch.float32 else Float16Module(config, module)
    ddp = DistributedDataParallel(config=config, ddp_config=ddp_config, module=inner)
    ddp.broadcast_params()
    return Policy(config=config, module=module, ddp=ddp)


def frozen_copy(policy: Policy, config: Config, platform: Platform, *, vocab_size: int) -> Any:
    """A second module with the policy's present weights (the reference), for use under no_grad.

    Its parameters go on requiring gradients: `torch.matmul` picks its kernel by that, and the two
    must be scored by the same ones.
    """
    reference_config = copy.copy(policy.config)
    reference = build_module(reference_config, config.model, platform, vocab_size=vocab_size)
    if platform.params_dtype != torch.float32:
        reference = reference.to(platform.params_dtype)
    reference.load_state_dict(policy.module.state_dict())
    return reference.eval()
