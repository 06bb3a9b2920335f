"""One table from Megatron-Core parameters to Hugging Face tensors, for every family.

Weight exchange and checkpoint conversion both read it, so they cannot drift. Order: embeddings,
layers ascending, final norm, head; the parts of one fused tensor stand together.

A tensor-parallel rank holds of each Hugging Face tensor the slice of its own along `dim`, so one
`split` and one `merge` serve whole parameters and slices alike:

    split(parameter of rank r) = the slices r of the Hugging Face tensors,    merge = its inverse
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from megatron_sip.config_model import Model

Split = Callable[[torch.Tensor, Model], list[torch.Tensor]]
Merge = Callable[[list[torch.Tensor], Model], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it holds."""

    megatron: tuple[str, ...]  # global name with the local spec, then with Transformer Engine's
    names: tuple[str, ...]  # Hugging Face
    shapes: tuple[tuple[int, ...], ...]  # of the whole tensors
    dim: int | None  # the dimension that tensor parallelism slices, None if replicated
    split: Split  # this rank's parameter -> its slices of the Hugging Face tensors
    merge: Merge  # and back
    layer: int | None  # decoder layer (0-based); None: outside the stack
    first_stage: bool  # for layer None: on the first pipeline stage, else on the last
    padded: bool = False  # rows follow that Hugging Face does not have
    expert: int | None = None  # of the layer (0-based); None: no expert's


def _split_qkv(fused: torch.Tensor, model: Model) -> list[torch.Tensor]:
    """[groups x (q..q, k, v), ...] -> q, k, v."""
    per_group = model.num_attention_heads // model.num_query_groups
    rest = fused.shape[1:]
    grouped = fused.reshape(-1, per_group + 2, model.head_dim, *rest)
    return [part.reshape(-1, *rest) for part in grouped.split([per_group, 1, 1], dim=1)]


def _merge_qkv(parts: list[torch.Tensor], model: Model) -> torch.Tensor:
    per_group = model.num_attention_heads // model.num_query_groups
    rest = parts[0].shape[1:]
    grouped = [
        part.reshape(-1, count, model.head_dim, *rest)
        for part, count in zip(parts, (per_group, 1, 1), strict=True)
    ]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _whole(tensor: torch.Tensor, model: Model) -> list[torch.Tensor]:
    return [tensor]


def _only(parts: list[torch.Tensor], model: Model) -> torch.Tensor:
    (part,) = parts
    return part


def _halves(fused: torch.Tensor, model: Model) -> list[torch.Tensor]:
    """[gate; up] -> gate, up."""
    return list(fused.chunk(2))


def _stack(parts: list[torch.Tensor], model: Model) -> torch.Tensor:
    return torch.cat(parts)


def _attention(i: int, m: Model) -> Iterator[Entry]:
    source, target = f"decoder.layers.{i}.self_attention", f"model.layers.{i}.self_attn"
    h, d = m.hidden_size, m.head_dim
    q, kv = m.num_attention_heads * d, m.num_query_groups * d
    qkv = tuple(f"{target}.{x}_proj" for x in "qkv")
    yield Entry((f"{source}.linear_qkv.weight",), tuple(f"{n}.weight" for n in qkv),
                ((q, h), (kv, h), (kv, h)), 0, _split_qkv, _merge_qkv, i, False)  # fmt: skip
    if m.qkv_bias:
        yield Entry((f"{source}.linear_qkv.bias",), tuple(f"{n}.bias" for n in qkv),
                    ((q,), (kv,), (kv,)), 0, _split_qkv, _merge_qkv, i, False)  # fmt: skip
    if m.qk_norm:
        for x in "qk":
            yield Entry((f"{source}.{x}_layernorm.weight",), (f"{target}.{x}_norm.weight",),
                        ((d,),), None, _whole, _only, i, False)  # fmt: skip
    yield Entry((f"{source}.linear_proj.weight",), (f"{target}.o_proj.weight",),
                ((h, q),), 1, _whole, _only, i, False)  # fmt: skip


def _mlp(i: int, m: Model) -> Iterator[Entry]:
    """The MLP of a layer, or its router and experts."""
    source, target = f"decoder.layers.{i}.mlp", f"model.layers.{i}.mlp"
    h, f = m.hidden_size, m.ffn_hidden_size
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    if m.family == "mixtral":
        target, gate, up, down = f"model.layers.{i}.block_sparse_moe", "w1", "w3", "w2"

    def pair(
        fc1: tuple[str, ...], fc2: tuple[str, ...], at: str, expert: int | None = None
    ) -> Iterator[Entry]:
        yield Entry(fc1, (f"{at}.{gate}.weight", f"{at}.{up}.weight"), ((f, h), (f, h)),
                    0, _halves, _stack, i, False, expert=expert)  # fmt: skip
        yield Entry(fc2, (f"{at}.{down}.weight",), ((h, f),), 1, _whole, _only, i, False,
                    expert=expert)  # fmt: skip

    if m.experts is None:
        yield from pair((f"{source}.linear_fc1.weight",), (f"{source}.linear_fc2.weight",), target)
        return
    yield Entry((f"{source}.router.weight",), (f"{target}.gate.weight",),
                ((m.experts.num_experts, h),), None, _whole, _only, i, False)  # fmt: skip
    for j in range(m.experts.num_experts):  # each alone, or all of a rank in one grouped product
        fc1, fc2 = (
            (f"{source}.experts.local_experts.{j}.{n}.weight", f"{source}.experts.{n}.weight{j}")
            for n in ("linear_fc1", "linear_fc2")
        )
        yield from pair(fc1, fc2, f"{target}.experts.{j}", expert=j)


def _layer(i: int, m: Model) -> Iterator[Entry]:
    source, target = f"decoder.layers.{i}", f"model.layers.{i}"

    def norm(megatron: tuple[str, ...], name: str) -> Entry:
        return Entry(tuple(f"{source}.{n}" for n in megatron), (f"{target}.{name}.weight",),
                     ((m.hidden_size,),), None, _whole, _only, i, False)  # fmt: skip

    yield norm(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
               "input_layernorm")  # fmt: skip
    yield from _attention(i, m)
    yield norm(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
               "post_attention_layernorm")  # fmt: skip
    yield from _mlp(i, m)


def name_table(model: Model, *, vocab_size: int) -> list[Entry]:
    """Entries of the whole model; tied models have no head of their own.

    Args: vocab_size: rows of the embedding, without padding.
    """
    h = model.hidden_size

    def vocabulary(megatron: str, name: str, first: bool) -> Entry:
        return Entry((megatron,), (name,), ((vocab_size, h),), 0, _whole, _only, None, first, True)

    table = [vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", True)]
    for i in range(model.num_layers):
        table += _layer(i, model)
    table.append(Entry(("decoder.final_layernorm.weight",), ("model.norm.weight",), ((h,),),
                       None, _whole, _only, None, False))  # fmt: skip
    if not model.share_embeddings_and_output_weights:
        table.append(vocabulary("output_layer.weight", "lm_head.weight", False))
    return table


def held_name(entry: Entry, held: Collection[str]) -> str:
    """Which of an entry's names is among a rank's parameters.

    Raises: ValueError if none or both are: the model is not of this table.
    """
    found = [name for name in entry.megatron if name in held]
    if len(found) != 1:
        raise ValueError(
            f"this rank holds {len(found)} of the parameters {', '.join(entry.megatron)}; exactly "
            "one is needed"
        )
    return found[0]


def stage_of(entry: Entry, model: Model, *, pipeline_size: int) -> int:
    """Pipeline stage that holds an entry (layers are split evenly)."""
    if entry.layer is None:
        return 0 if entry.first_stage else pipeline_size - 1
    return entry.layer // (model.num_layers // pipeline_size)


def replica_of(entry: Entry, model: Model, *, expert_size: int) -> int:
    """First data-parallel replica that holds an entry (experts are split evenly over the first)."""
    if entry.expert is None or model.experts is None:
        return 0
    return entry.expert // (model.experts.num_experts // expert_size)
