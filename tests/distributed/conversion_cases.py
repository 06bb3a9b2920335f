"""Small odd models of every family, as transformers writes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

VOCAB = 131  # a prime
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "rms_norm_eps": 1e-4, "bos_token_id": None, "eos_token_id": 0,
    "attn_implementation": "eager",
}  # fmt: skip
SCALING = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 700.0}
EXPERTS = {"num_experts_per_tok": 2, "rope_parameters": DEFAULT}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": DEFAULT, "num_key_value_heads": 6}),
    "llama tied scaled": (
        "Llama", {"rope_parameters": SCALING, "tie_word_embeddings": True, "head_dim": 10}
    ),
    "mistral": (
        "Mistral", {"rope_parameters": DEFAULT, "head_dim": 14, "sliding_window": None}
    ),
    "qwen2 tied": ("Qwen2", {"rope_parameters": DEFAULT, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": DEFAULT, "head_dim": 12}),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3Moe",
        EXPERTS | {"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": True,
                   "head_dim": 10},
    ),
    "qwen3_moe whole softmax": (
        "Qwen3Moe",
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": False,
                   "head_dim": 12, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def reference(name: str, **sizes: Any) -> Any:
    """A random model of transformers; norms and biases are not what they start as."""
    import transformers

    family, changed = CASES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | changed | sizes)
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of one word an id."""
    from tokenizers import AddedToken, Tokenizer, models

    words = {"</s>": 0} | {f"w{i}": i for i in range(1, VOCAB - 2)}  # two ids are never used
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )


def write_folder(folder: Path, name: str, **sizes: Any) -> Path:
    """Of several shards."""
    reference(name, **sizes).save_pretrained(folder, max_shard_size="40KB")
    write_tokenizer(folder)
    return folder


def convert(function: str, sources: dict[str, Path], targets: dict[str, Path], more: str) -> None:
    """All of them in one process, which Megatron-Core's patches may change."""
    calls = [f"checkpoints.{function}(Path({str(sources[n])!r}), Path({str(targets[n])!r}), {more},"
             " progress=print)" for n in targets]  # fmt: skip
    head = "from pathlib import Path\nfrom megatron_sip.convert import checkpoints\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + "\n".join(calls)], capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
