"""What a run needs of its hosts beside the tensors of training. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sip.config import Config
from megatron_sip.convert.names import name_table
from megatron_sip.explain.files import checkpoint_bytes
from megatron_sip.explain.parameters import Parameters
from megatron_sip.rollout.bucket_file import NUM_SLOTS, grouped, num_bytes


@dataclass(frozen=True)
class Host:
    """Bytes; 0 for what the recipe does without."""

    slots: int
    """Of shared memory on rank 0's host, for the run's whole life: weights are exchanged through
    files there. They are also part of rank 0's `Memory.exchange`."""
    checkpoint_copy: int
    """Of host memory, all ranks together, while an asynchronous checkpoint is written."""


def host_needs(
    config: Config, parameters: Parameters, *, vocab_size: int, dtype: torch.dtype
) -> Host:
    """What the recipe takes of its hosts.

    Args: vocab_size: rows of the embedding, without padding. dtype: of the trained weights.
    """
    copy = checkpoint_bytes(config, parameters) if config.checkpoint.asynchronous else 0
    return Host(slot_bytes(config, vocab_size=vocab_size, dtype=dtype), copy)


def slot_bytes(config: Config, *, vocab_size: int, dtype: torch.dtype) -> int:
    """Size of the files that weights are exchanged through, less their headers of some KiB."""
    if config.rollout is None or config.rollout.weight_transfer != "shared_memory":
        return 0
    tensors = (
        (name, dtype, shape)
        for entry in name_table(config.model, vocab_size=vocab_size)
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    )
    buckets = grouped(tensors, config.rollout.bucket_mib * 2**20)
    return NUM_SLOTS * max(num_bytes(bucket) for bucket in buckets)
