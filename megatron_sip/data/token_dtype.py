"""Type of the token ids in `.bin`."""

from __future__ import annotations

import numpy as np

UINT16_LIMIT = 65_500  # Megatron-Core's own: larger vocabularies get int32


def dtype_of(vocab_size: int) -> np.dtype:
    """As Megatron-Core's `DType.optimal_dtype` chooses it."""
    return np.dtype(np.uint16 if vocab_size < UINT16_LIMIT else np.int32)
