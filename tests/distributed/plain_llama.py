"""A Llama in plain PyTorch, float64, one process: the oracle of the distributed tests.

It knows Hugging Face tensor names and the published architecture (RMSNorm, rotary embedding on
half vectors, grouped-query attention, SwiGLU; what Qwen and Mixtral add where there are weights for
it) and shares no code with what it checks.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def frequencies(half: int, model: dict[str, Any]) -> list[float]:
    """base^(-2i / dim), with the long waves slowed down where the model scales them."""
    found = [model["rotary_base"] ** (-i / half) for i in range(half)]
    scaling = model.get("rope_scaling")
    if scaling is None:
        return found
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for i, f in enumerate(found):
        wave = 2 * math.pi / f
        if wave > context / low:
            found[i] = f / scaling["factor"]
        elif wave > context / high:
            s = (context / wave - low) / (high - low)
            found[i] = (1 - s) * f / scaling["factor"] + s * f
    return found


def rotate(x: torch.Tensor, model: dict[str, Any]) -> torch.Tensor:
    """Rotary embedding of [heads, time, dim]: pair (i, i + dim / 2) turns by t x frequency i."""
    half = x.shape[-1] // 2
    frequency = torch.tensor(frequencies(half, model), dtype=x.dtype)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency
    left, right = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(
    x: torch.Tensor, weights: dict[str, torch.Tensor], prefix: str, model: dict[str, Any]
) -> torch.Tensor:
    """Causal attention in which each key-value head serves heads / groups query heads."""
    heads, groups = int(model["num_attention_heads"]), int(model["num_query_groups"])
    length = len(x)
    dim = weights[f"{prefix}.q_proj.weight"].shape[0] // heads

    def project(name: str, count: int) -> torch.Tensor:
        out = x @ weights[f"{prefix}.{name}_proj.weight"].T
        if f"{prefix}.{name}_proj.bias" in weights:
            out = out + weights[f"{prefix}.{name}_proj.bias"]
        out = out.view(length, count, dim)
        if f"{prefix}.{name}_norm.weight" in weights:
            out = rms_norm(out, weights[f"{prefix}.{name}_norm.weight"], model["norm_epsilon"])
        return out.transpose(0, 1)

    q = rotate(project("q", heads), model)
    k = rotate(project("k", groups), model)
    v = project("v", groups)
    future = torch.ones(length, length).triu(1).bool()
    out = []
    for head in range(heads):
        group = head // (heads // groups)
        score = (q[head] @ k[group].T / dim**0.5).masked_fill(future, -torch.inf)
        out.append(score.softmax(-1) @ v[group])
    return torch.cat(out, -1) @ weights[f"{prefix}.o_proj.weight"].T


def swiglu(x: torch.Tensor, weights: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    gate, up, down = (weights[f"{name}.weight"] for name in names)
    opened = x @ gate.T
    return (opened * torch.sigmoid(opened) * (x @ up.T)) @ down.T


def mlp(
    x: torch.Tensor, weights: dict[str, torch.Tensor], layer: str, model: dict[str, Any]
) -> torch.Tensor:
    """The MLP of a layer, or its experts: all of them on all tokens, and most of it times zero."""
    experts = model.get("experts")
    if experts is None:
        return swiglu(x, weights, [f"{layer}.mlp.{n}_proj" for n in ("gate", "up", "down")])
    at, names = f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj")
    if model["family"] == "mixtral":
        at, names = f"{layer}.block_sparse_moe", ("w1", "w3", "w2")
    chances = (x @ weights[f"{at}.gate.weight"].T).softmax(-1)
    chosen = chances.topk(experts["experts_per_token"]).indices
    chances = chances * torch.zeros_like(chances).scatter(1, chosen, 1.0)
    if experts["normalize"]:
        chances = chances / chances.sum(-1, keepdim=True)
    return sum(
        (chances[:, j, None] * swiglu(x, weights, [f"{at}.experts.{j}.{n}" for n in names])
         for j in range(experts["num_experts"])),
        torch.zeros_like(x),
    )  # fmt: skip


def logprobs(
    weights: dict[str, torch.Tensor], model: dict[str, Any], ids: torch.Tensor
) -> torch.Tensor:
    """Log-probability of ids[1:], each given all before it; float64[len(ids) - 1], nats."""
    epsilon = model["norm_epsilon"]
    x = weights["model.embed_tokens.weight"][ids[:-1]]
    for i in range(int(model["num_layers"])):
        layer = f"model.layers.{i}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], epsilon)
        x = x + attention(normed, weights, f"{layer}.self_attn", model)
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], epsilon)
        x = x + mlp(normed, weights, layer, model)
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = x @ head.T
    chosen = logits.gather(-1, ids[1:, None])[:, 0]
    return chosen - logits.logsumexp(-1)
