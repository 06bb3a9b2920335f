"""Weights of a Hugging Face folder into a Megatron model: each rank reads its own slices alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_sip.config_model import Model
from megatron_sip.convert.names import Entry, held_name, name_table
from megatron_sip.convert.tensor_folder import TensorFolder
from megatron_sip.errors import refuse
from megatron_sip.model import global_name

SHOWN = 5  # names of a message
HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def load_folder(folder: Path, module: Any, model: Model, *, vocab_size: int) -> None:
    """Fill the parameters of this rank's module; the padding of the vocabulary becomes zero.

    Raises: ValueError naming the tensors that the folder lacks, has beside those of the model, or
            has in another shape.
    """
    tensors = TensorFolder(folder)
    table = name_table(model, vocab_size=vocab_size)
    refuse([*problems(tensors, table, model, folder)])
    group = module.pg_collection.tp
    held = {global_name(n, module): p for n, p in module.named_parameters()}
    if model.share_embeddings_and_output_weights and HEAD in held:
        held[EMBEDDING] = held.pop(HEAD)  # the last stage's copy of a tied matrix
    for entry in table:
        if not any(name in held for name in entry.megatron):
            continue  # of another pipeline stage
        parameter = held.pop(held_name(entry, held))
        parameter.data.copy_(
            _of_rank(tensors, entry, model, parameter, rank=group.rank(), size=group.size())
        )
    if held:
        raise ValueError(f"no tensor of a Hugging Face folder is known for {', '.join(held)}")


def _of_rank(
    tensors: TensorFolder, entry: Entry, model: Model, like: torch.Tensor, *, rank: int, size: int
) -> torch.Tensor:
    """This rank's parameter of an entry."""
    parts = []
    for name, shape in zip(entry.names, entry.shapes, strict=True):
        if entry.dim is None:
            parts.append(tensors.read(name))
            continue
        width = len(like) if entry.padded else shape[entry.dim] // size
        start, stop = (min(i * width, shape[entry.dim]) for i in (rank, rank + 1))
        part = tensors.read(name, slice(start, stop), dim=entry.dim)
        parts.append(part)
        if entry.padded and len(part) < width:
            parts[-1] = torch.cat([part, part.new_zeros(width - len(part), *shape[1:])])
    return entry.merge(parts, model)


def problems(
    tensors: TensorFolder, table: list[Entry], model: Model, folder: Path
) -> Iterator[str]:
    """What of a folder's tensors is not as the table says."""
    wanted = {n: s for e in table for n, s in zip(e.names, e.shapes, strict=True)}
    missing = [name for name in wanted if name not in tensors.tensors]
    if missing:
        yield f"{folder} lacks parameters of a {model.family} model: {_listed(missing)}"
    unknown = [n for n in tensors.tensors if n not in wanted and not _is_derived(n, model)]
    if unknown:
        yield (
            f"{folder} holds parameters that a {model.family} model of these sizes does not have: "
            f"{_listed(unknown)}"
        )
    for name, shape in wanted.items():
        found = tensors.tensors.get(name)
        if found is not None and found.shape != shape:
            yield f"{folder}: {name} has shape {found.shape}, but config.json says {shape}"


def _is_derived(name: str, model: Model) -> bool:
    """Tensors that older writers saved beside what they follow from."""
    tied_head = model.share_embeddings_and_output_weights and name == "lm_head.weight"
    return tied_head or name.endswith(".rotary_emb.inv_freq")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
