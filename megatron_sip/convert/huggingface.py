"""Write the policy as a Hugging Face Llama folder: config.json and sharded safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_sip.config import Model

SHARD_BYTES = 4 * 2**30


def llama_config(
    model: Model, *, vocab_size: int, eos_token_id: int, dtype: torch.dtype
) -> dict[str, object]:
    """config.json of the folder."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "rope_theta": float(model.rotary_base),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def write_folder(
    folder: Path, config: dict[str, object], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write config.json, shards of at most 4 GiB and their index, one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = total = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        if shard:
            count += 1
            name = f"model-{count:05d}.safetensors"
            save_file(shard, folder / name, metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, name))
            shard, size = {}, 0

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if size + nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.detach().to("cpu", copy=True)
        size, total = size + nbytes, total + nbytes
    flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    )
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(config, indent=1))
    os.replace(temporary, folder / "config.json")
