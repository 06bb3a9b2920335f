"""One table from Megatron-Core parameters to Hugging Face Llama tensors.

Weight exchange and checkpoint conversion both read it, so they cannot drift. Order: embeddings,
layers ascending, final norm, head; the parts of one fused tensor stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_sip.config import Model

Split = Callable[[torch.Tensor, Model], list[torch.Tensor]]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it holds."""

    megatron: tuple[str, ...]  # global name with the local spec, then with Transformer Engine's
    names: tuple[str, ...]  # Hugging Face
    shapes: tuple[tuple[int, ...], ...]  # of the full tensors
    gather_dim: int | None  # tensor-parallel dimension, None if replicated
    join: Callable[[list[torch.Tensor]], torch.Tensor]  # slices of all TP ranks -> full
    split: Split  # full Megatron tensor -> Hugging Face tensors
    layer: int | None  # decoder layer (0-based); None: outside the stack
    first_stage: bool  # for layer None: on the first pipeline stage, else on the last


def _split_qkv(full: torch.Tensor, model: Model) -> list[torch.Tensor]:
    """[groups x (q..q, k, v), hidden] -> q, k, v."""
    head_dim = model.hidden_size // model.num_attention_heads
    per_group = model.num_attention_heads // model.num_query_groups
    grouped = full.view(model.num_query_groups, per_group + 2, head_dim, model.hidden_size)
    q, k, v = grouped.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, model.hidden_size) for part in (q, k, v)]


def _join_gated(parts: list[torch.Tensor]) -> torch.Tensor:
    """Each TP rank holds [gate slice; up slice]."""
    halves = [part.chunk(2) for part in parts]
    return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


def _whole(full: torch.Tensor, model: Model) -> list[torch.Tensor]:
    return [full]


def _halves(full: torch.Tensor, model: Model) -> list[torch.Tensor]:
    return list(full.chunk(2))


def _cat(dim: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    return lambda parts: torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _layer_entries(i: int, m: Model) -> Iterator[Entry]:
    source, target = f"decoder.layers.{i}", f"model.layers.{i}"
    h, f = m.hidden_size, m.ffn_hidden_size
    kv = h // m.num_attention_heads * m.num_query_groups

    def entry(megatron, names, shapes, gather_dim, join, split) -> Entry:
        return Entry(
            tuple(f"{source}.{n}.weight" if "layer_norm" not in n else f"{source}.{n}"
                  for n in megatron),
            tuple(f"{target}.{n}.weight" for n in names),
            shapes, gather_dim, join, split, i, False,
        )  # fmt: skip

    yield entry(("input_layernorm", "self_attention.linear_qkv.layer_norm_weight"),
                ("input_layernorm",), ((h,),), None, _cat(0), _whole)  # fmt: skip
    yield entry(("self_attention.linear_qkv",),
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ((h, h), (kv, h), (kv, h)), 0, _cat(0), _split_qkv)  # fmt: skip
    yield entry(
        ("self_attention.linear_proj",), ("self_attn.o_proj",), ((h, h),), 1, _cat(1), _whole
    )
    yield entry(("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm_weight"),
                ("post_attention_layernorm",), ((h,),), None, _cat(0), _whole)  # fmt: skip
    yield entry(("mlp.linear_fc1",), ("mlp.gate_proj", "mlp.up_proj"), ((f, h), (f, h)),
                0, _join_gated, _halves)  # fmt: skip
    yield entry(("mlp.linear_fc2",), ("mlp.down_proj",), ((h, f),), 1, _cat(1), _whole)


def name_table(model: Model, *, vocab_size: int) -> list[Entry]:
    """Entries of the whole model; tied models have no head of their own."""
    h = model.hidden_size
    vocab = ((vocab_size, h),)

    def outside(megatron, name, shapes, dim, first) -> Entry:
        return Entry((megatron,), (name,), shapes, dim, _cat(0), _whole, None, first)

    table = [
        outside("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, 0, True)
    ]
    for i in range(model.num_layers):
        table += _layer_entries(i, model)
    table.append(
        outside("decoder.final_layernorm.weight", "model.norm.weight", ((h,),), None, False)
    )
    if not model.share_embeddings_and_output_weights:
        table.append(outside("output_layer.weight", "lm_head.weight", vocab, 0, False))
    return table


def stage_of(entry: Entry, model: Model, *, pipeline_size: int) -> int:
    """Pipeline stage that holds an entry (layers are split evenly)."""
    if entry.layer is None:
        return 0 if entry.first_stage else pipeline_size - 1
    return entry.layer // (model.num_layers // pipeline_size)
