"""Parameters of the policy, whole and per rank of each pipeline stage, by part. Pure.

Shapes come from `convert.names.name_table`, the table that also drives weight exchange and
checkpoint conversion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sip.config import Model, Parallel
from megatron_sip.convert.names import Entry, name_table, replica_of, stage_of

PARTS: tuple[str, ...] = ("embedding", "attention", "mlp", "experts", "norms", "head")


@dataclass(frozen=True)
class Parameters:
    """Counts of elements by part."""

    total: dict[str, int]
    per_rank: tuple[dict[str, int], ...]  # one entry a pipeline stage; all its ranks hold the same


def part_of(entry: Entry) -> str:
    """Which of PARTS an entry belongs to."""
    name = entry.megatron[0]
    if "layernorm" in name:
        return "norms"
    if entry.layer is None:
        return "embedding" if entry.first_stage else "head"
    if entry.expert is not None:
        return "experts"
    return "attention" if "self_attention" in name else "mlp"  # a router is an MLP's


def count_parameters(model: Model, parallel: Parallel, *, vocab_size: int) -> Parameters:
    """Parameters of the policy; the padding of the vocabulary is in `per_rank` alone.

    With tied embeddings the last of several stages holds a second copy, as its head; it counts
    in that stage's `per_rank` and not in `total`.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    total = dict.fromkeys(PARTS, 0)
    per_rank = [dict.fromkeys(PARTS, 0) for _ in range(pp)]
    for entry in name_table(model, vocab_size=vocab_size):
        part, numel = part_of(entry), sum(math.prod(shape) for shape in entry.shapes)
        held = numel if entry.dim is None else numel // tp
        if replica_of(entry, model, expert_size=parallel.expert_model_parallel_size) != 0:
            held = 0  # of the first replica's rank; the others hold as many
        if entry.padded:
            padded = model.padded_vocabulary(vocab_size, tensor_parallel=tp)
            held = padded // tp * model.hidden_size
        total[part] += numel
        per_rank[stage_of(entry, model, pipeline_size=pp)][part] += held
    if model.share_embeddings_and_output_weights and pp > 1:
        per_rank[-1]["head"] = per_rank[0]["embedding"]
    return Parameters(total, tuple(per_rank))
