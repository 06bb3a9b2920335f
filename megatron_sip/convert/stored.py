"""Weights of a checkpoint as Hugging Face tensors, one at a time; no model is ever whole.

A module on the meta device, which has shapes and no memory, says what the checkpoint calls its
parameters and where they stand; torch's reader fetches what is asked for and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sip.checkpoint_reading import Reader, read_metadata
from megatron_sip.config import Parallel
from megatron_sip.config_model import Model
from megatron_sip.convert.names import held_name, name_table
from megatron_sip.model import build_module, transformer_config
from megatron_sip.platform import Platform


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the embedding of a verified checkpoint, as of all its weights."""
    tensors: Any = read_metadata(folder).state_dict_metadata
    return tensors["embedding.word_embeddings.weight"].properties.dtype


def stored_tensors(
    folder: Path, model: Model, platform: Platform, *, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of a verified checkpoint, in the order of the name table.

    Args: platform: of this process, alone in its process groups; its dtype is the checkpoint's.
          vocab_size: rows of the embedding without padding.
    """
    platform = replace(platform, device=torch.device("meta"))
    config = transformer_config(model, Parallel(world_size=1), platform)
    with torch.device("meta"):
        module = build_module(config, model, platform, vocab_size=vocab_size)
    places: dict[str, Any] = module.to(platform.params_dtype).sharded_state_dict()
    reader = Reader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    for entry in name_table(model, vocab_size=vocab_size):
        place = places[held_name(entry, places)]
        rows = vocab_size if entry.padded else None
        if hasattr(place, "build"):  # stored in parts, such as gate and up
            parts = [_read(reader, metadata, part, rows) for part in place.build()]
            whole = place.merge_fn(parts)
        else:
            whole = _read(reader, metadata, place, rows)
        yield from zip(entry.names, entry.split(whole, model), strict=True)


def _read(reader: Reader, metadata: Metadata, place: Any, rows: int | None) -> torch.Tensor:
    """A tensor, or its first rows, put together from the pieces that the ranks have saved.

    Args:   place: Megatron-Core's ShardedTensor.
    Raises: ValueError if the checkpoint does not hold it.
    """
    shape = (place.local_shape[0] if rows is None else rows, *place.local_shape[1:])
    stored: Any = metadata.state_dict_metadata.get(place.key)
    if stored is None:
        raise ValueError(f"{reader.path} does not hold {place.key}; it is of another model")
    whole = torch.empty((1,) * place.prepend_axis_num + shape, dtype=stored.properties.dtype)
    chunk = ChunkStorageMetadata(offsets=torch.Size(place.global_offset), sizes=whole.shape)
    items = create_read_items_for_chunk_list(place.key, stored, [chunk])
    read = sum(item.lengths.numel() for item in items)
    if read != whole.numel():
        raise ValueError(
            f"{reader.path} holds {read} of the {whole.numel()} numbers of {place.key}; it is of "
            "another model"
        )
    planner: Any = _Into(whole)
    reader.read_data(LoadPlan(items), planner)
    return whole.view(shape)


@dataclass(frozen=True)
class _Into:
    """Where the reader puts what it has read."""

    whole: torch.Tensor

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        cut = tuple(
            slice(start, start + length)
            for start, length in zip(item.dest_offsets, item.lengths, strict=True)
        )
        return self.whole[cut]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None: ...
