"""The only place where a pickle is read: every class that it names must be known here.

Megatron-Core reads three kinds of pickles from a checkpoint: `.metadata` (by plain pickle),
`common.pt` and sharded objects (the latter by torch.load with weights_only=False). A pickle calls
whatever it names, so a name that is not listed is refused before it is imported. Sharded objects
are None, tensors, or what Transformer Engine keeps of an FP8 layer: a tensor whose bytes are a
pickle once more.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

EXTRA_STATE = "_extra_state"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64",
           "int32", "int16", "int8", "uint8", "bool")  # fmt: skip
_DTYPE_NAMES = frozenset(("torch", name) for name in _DTYPES)
_CHECKPOINT = "torch.distributed.checkpoint"
METADATA = _DTYPE_NAMES | {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
    *((f"{_CHECKPOINT}.planner", name)
      for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *((f"{_CHECKPOINT}.metadata", name)
      for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
                   "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
                   "StorageMeta")),
}  # fmt: skip
_LOAD_FROM_BYTES = ("torch.storage", "_load_from_bytes")
FP8_STATE = _DTYPE_NAMES | {
    ("collections", "OrderedDict"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    _LOAD_FROM_BYTES,
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
    *(("transformer_engine.common.recipe", name)
      for name in ("Format", "_FormatHelper", "DelayedScaling", "Float8CurrentScaling",
                   "Float8BlockScaling", "MXFP8BlockScaling", "QParams", "MMParams")),
}  # fmt: skip


class NotKnown(ValueError):
    """A pickle names what is not loaded; nothing of it was imported or called."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: frozenset[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(data))
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise NotKnown(f"it names {module}.{name}")
        if (module, name) == _LOAD_FROM_BYTES:
            return weights_only  # torch's own would unpickle whatever the bytes hold
        return super().find_class(module, name)


def unpickle(data: bytes, known: frozenset[tuple[str, str]]) -> Any:
    """The object that `data` is the pickle of.

    Raises: ValueError if it names a class or function that is not in `known`, or is damaged.
    """
    try:
        return _Unpickler(data, known).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError,
            TypeError, ImportError) as error:  # fmt: skip
        raise ValueError(f"it is no pickle of ours ({type(error).__name__}: {error})") from None


def weights_only(data: bytes | io.BytesIO | Path) -> Any:
    """Tensors and plain values of a file that torch.save wrote, on the CPU.

    Raises: ValueError if it names anything else, or is damaged.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise NotKnown(f"it holds more than tensors and plain values ({first})") from None


def sharded_object(name: str, data: io.BytesIO) -> list[Any]:
    """The values of a sharded object of a checkpoint, as Megatron-Core keeps them in one list.

    Raises: ValueError if one is more than tensors and plain values; if a layer's extra state is
            neither None nor a tensor of FP8 state.
    """
    found = weights_only(data)
    if not isinstance(found, list):
        raise NotKnown(f"it holds a {type(found).__name__} in place of a list")
    if name.partition("/")[0].endswith(EXTRA_STATE):
        for state in found:
            _check_extra_state(state)
    return found


def _check_extra_state(state: Any) -> None:
    if state is None:
        return
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise NotKnown(f"it holds a {type(state).__name__} as a layer's extra state")
    if state.numel():
        unpickle(state.numpy().tobytes(), FP8_STATE)  # as Transformer Engine will


def refuse_unguarded_torch() -> None:
    """Raises: ValueError if torch was told to unpickle whatever files hold."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(name):
        raise ValueError(f"the environment variable {name} makes torch.load run code; unset it")
