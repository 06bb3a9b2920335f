"""A Llama in plain PyTorch, float64, one process: the oracle of the distributed tests.

It knows Hugging Face tensor names and the published architecture (RMSNorm, rotary embedding on
half vectors, grouped-query attention, SwiGLU) and shares no code with what it checks.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding of [heads, time, dim]: pair (i, i + dim / 2) turns by t base^(-2i / dim)."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency
    left, right = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(
    x: torch.Tensor, weights: dict[str, torch.Tensor], prefix: str, model: dict[str, float]
) -> torch.Tensor:
    """Causal attention in which each key-value head serves heads / groups query heads."""
    heads, groups = int(model["num_attention_heads"]), int(model["num_query_groups"])
    length, hidden = x.shape
    dim = hidden // heads

    def project(name: str, count: int) -> torch.Tensor:
        return (x @ weights[f"{prefix}.{name}.weight"].T).view(length, count, dim).transpose(0, 1)

    q = rotate(project("q_proj", heads), model["rotary_base"])
    k = rotate(project("k_proj", groups), model["rotary_base"])
    v = project("v_proj", groups)
    future = torch.ones(length, length).triu(1).bool()
    out = []
    for head in range(heads):
        group = head // (heads // groups)
        score = (q[head] @ k[group].T / dim**0.5).masked_fill(future, -torch.inf)
        out.append(score.softmax(-1) @ v[group])
    return torch.cat(out, -1) @ weights[f"{prefix}.o_proj.weight"].T


def logprobs(
    weights: dict[str, torch.Tensor], model: dict[str, float], ids: torch.Tensor
) -> torch.Tensor:
    """Log-probability of ids[1:], each given all before it; float64[len(ids) - 1], nats."""
    epsilon = model["norm_epsilon"]
    x = weights["model.embed_tokens.weight"][ids[:-1]]
    for i in range(int(model["num_layers"])):
        layer = f"model.layers.{i}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], epsilon)
        x = x + attention(normed, weights, f"{layer}.self_attn", model)
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], epsilon)
        gate = normed @ weights[f"{layer}.mlp.gate_proj.weight"].T
        up = normed @ weights[f"{layer}.mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = x @ head.T
    chosen = logits.gather(-1, ids[1:, None])[:, 0]
    return chosen - logits.logsumexp(-1)
