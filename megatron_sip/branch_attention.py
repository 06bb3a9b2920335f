"""Core attention for rows in which several branches share one prefix.

A position sees the prefix and its own branch up to itself, nothing of other branches. The mask is
not made in advance: `branch_ids` int32[b, s] travel as `attention_mask` through Megatron's layers,
pipeline stages and recomputation, and a kernel makes of them what it needs, once a micro-batch.
Heads are independent, so tensor parallelism needs nothing; context parallelism and FP8 attention
are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

NEEDED = {
    "context_parallel_size": 1,
    "attention_dropout": 0.0,
    "window_size": None,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "apply_query_key_layer_scaling": False,
    "fp8_dot_product_attention": False,
}
KERNELS = 64  # at most so many compiled variants of FlexAttention
# For rows below 128 positions it would take its decoding kernel, which is for inference and does
# not compile for lengths that vary.
KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


def visible(branch_ids: torch.Tensor) -> torch.Tensor:
    """Which key each query sees.

        visible[i, j] = j <= i and (branch_j is the prefix or branch_j = branch_i)

    Args:    branch_ids: int32[b, s]: 0 prefix, 1.. branches, -1 padding.
    Returns: bool[b, 1, s, s], for all heads.
    """
    b, s = branch_ids.shape
    causal = torch.ones(s, s, dtype=torch.bool, device=branch_ids.device).tril()
    same = branch_ids[:, :, None] == branch_ids[:, None, :]
    seen = (same | (branch_ids == 0)[:, None, :]) & causal
    return seen.view(b, 1, s, s)


def additive_mask(branch_ids: torch.Tensor) -> torch.Tensor:
    """0 where `visible`, -inf elsewhere: float32[b, 1, s, s]."""
    seen = visible(branch_ids)
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def block_mask(branch_ids: torch.Tensor) -> Any:
    """FlexAttention's BlockMask of the same rule: blocks without a visible key are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    b, s = branch_ids.shape

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        theirs, mine = branch_ids[batch, key], branch_ids[batch, query]
        return (query >= key) & ((theirs == 0) | (theirs == mine))

    return create_block_mask(sees, b, None, s, s, device=branch_ids.device)


class OncePerMicroBatch:
    """Remembers what was last made of `branch_ids`: all layers of a micro-batch use one mask."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        self._make = make
        self._branch_ids: torch.Tensor | None = None
        self._made: Any = None

    def __call__(self, branch_ids: torch.Tensor) -> Any:
        if self._branch_ids is not branch_ids:
            self._branch_ids, self._made = branch_ids, self._make(branch_ids)
        return self._made


shared_additive_mask = OncePerMicroBatch(additive_mask)
shared_block_mask = OncePerMicroBatch(block_mask)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, branch_ids: torch.Tensor | None
) -> torch.Tensor:
    """PyTorch's scaled dot-product attention; the path of the CPU.

    Args:    query [b, n, s, d]; key, value [b, g, s, d] with g groups of n / g heads each;
             branch_ids int32[b, s], or None for plain causal attention.
    Returns: [b, n, s, d].
    """
    heads = query.shape[1] // key.shape[1]
    if heads > 1:
        key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
    if branch_ids is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = shared_additive_mask(branch_ids).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@cache
def compiled_flex_attention() -> Any:
    """FlexAttention as a fused kernel, one for all layers of this process.

    It is compiled anew for one row or several, for lengths of one block or more and whole blocks or
    not, each with and without gradient: more often than PyTorch's limit, past which the kernel
    would silently give way to one that holds all scores.
    """
    import torch._dynamo.config as limits
    from torch.nn.attention.flex_attention import flex_attention

    limits.recompile_limit = max(limits.recompile_limit, KERNELS)
    return torch.compile(flex_attention, fullgraph=True)  # fullgraph: an error past the limit


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, branch_ids: torch.Tensor
) -> torch.Tensor:
    """As `masked_attention`, without a mask tensor; the path of the GPU."""
    mask = shared_block_mask(branch_ids)
    return compiled_flex_attention()(
        query, key, value, block_mask=mask, enable_gqa=True, kernel_options=KERNEL_OPTIONS
    )


class BranchAttention(torch.nn.Module):
    """Megatron-Core's `core_attention` with branches; takes the place of either spec's own.

    Rows without branches go to `causal`, the kernel of the spec (Transformer Engine's), or, where
    there is none, to PyTorch's own causal attention.
    """

    def __init__(
        self, config: Any, layer_number: int, *, causal: Callable[..., Any] | None, **rest: Any
    ) -> None:
        """Raises: ValueError for what has no meaning here."""
        super().__init__()
        for name, wanted in NEEDED.items():
            if getattr(config, name) != wanted:
                raise ValueError(
                    f"{name} = {getattr(config, name)!r}: attention over branches needs {wanted!r}"
                )
        built = causal(config=config, layer_number=layer_number, **rest) if causal else None
        self.causal = built

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **rest: Any,
    ) -> torch.Tensor:
        """Attention of all heads of this rank.

        Args:    query [s, b, n, d]; key, value [s, b, g, d].
                 attention_mask: branch_ids int32[b, s], or None for plain causal attention.
        Returns: [s, b, n x d].
        """
        if attention_mask is None and self.causal is not None:
            return self.causal(query, key, value, None, **rest)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.is_cuda and attention_mask is not None:
            out = block_attention(q, k, v, attention_mask)
        else:
            out = masked_attention(q, k, v, attention_mask)
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def with_branch_attention(block_spec: Any, *, keep_causal: bool) -> Any:
    """The decoder's specs with `BranchAttention` in the place of their core attention.

    Args: keep_causal: rows without branches go on to use the spec's own kernel.
    """
    for layer in block_spec.layer_specs:
        parts = layer.submodules.self_attention.submodules
        causal = parts.core_attention if keep_causal else None
        if getattr(causal, "func", None) is not BranchAttention:  # layers may share one spec
            parts.core_attention = partial(BranchAttention, causal=causal)
    return block_spec
