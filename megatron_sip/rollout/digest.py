"""Digests of tensors and of a whole update, alike for the trainer and for the worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash


def tensor_digest(tensor: torch.Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes, as hex."""
    data = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
    return bytes_digest(tensor.dtype, tuple(tensor.shape), data)


def bytes_digest(dtype: torch.dtype, shape: Sequence[int], data: Any) -> str:
    """`tensor_digest` of a tensor whose bytes stand in a buffer."""
    digest = xxhash.xxh3_128(f"{dtype}{tuple(shape)}".encode())
    digest.update(data)
    return digest.hexdigest()
