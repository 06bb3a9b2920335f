"""Digest of one tensor, computed alike by the trainer that sends and the worker that receives."""

from __future__ import annotations

import torch
import xxhash


def tensor_digest(tensor: torch.Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes, as hex."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
