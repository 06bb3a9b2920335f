"""safetensors of a Hugging Face folder: tensors or slices of them read one at a time, written one
at a time. Nothing is unpickled, and no more than one tensor is held."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4 * 2**30
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFolder:
    """The tensors of a folder.

    Raises: ValueError if there are no safetensors, a file that the index names is missing or
            damaged, or a tensor is not of fp32, bf16 or fp16.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in _files_of(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(name)
                        self._add(file, name, part.get_dtype(), part.get_shape())
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read ({error}); copy it anew") from None

    def _add(self, file: Path, name: str, dtype: str, shape: list[int]) -> None:
        if name in self._files:
            raise ValueError(f"{name} is in {self._files[name].name} and in {file.name}; keep one")
        if dtype not in DTYPES:
            raise ValueError(
                f"{file}: {name} is of {dtype}, but only {', '.join(DTYPES)} are read; convert "
                "weights that are not quantised"
            )
        self._files[name] = file
        self.tensors[name] = TensorInfo(name, DTYPES[dtype], tuple(shape))

    def read(self, name: str, piece: slice | None = None, *, dim: int = 0) -> torch.Tensor:
        """A tensor, or a slice of it along dimension 0 or 1, as a copy of its own.

        The file is opened for it alone, so that its pages do not stay in this process's memory.
        """
        with safe_open(self._files[name], framework="pt") as opened:
            if piece is None:
                return opened.get_tensor(name).clone()
            part = opened.get_slice(name)
            return (part[piece] if dim == 0 else part[:, piece]).clone()


def _files_of(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is no index of safetensors; copy it anew") from None
    else:
        named = {SINGLE}
    outside = sorted(name for name in named if Path(name).name != name)
    if outside:
        raise ValueError(f"{index} names {outside[0]}, which is not a file of its folder")
    missing = sorted(name for name in named if not (folder / name).is_file())
    if not missing:
        return [folder / name for name in sorted(named)]
    pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
    if pickled:
        raise ValueError(
            f"{folder} has its weights in {pickled[0]}, which would have to be unpickled, and that "
            "can run code; get or save the model as safetensors"
        )
    raise ValueError(f"{folder} lacks weights: {', '.join(missing)}; copy them there")


def write_tensors(
    folder: Path,
    infos: Iterable[TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write model.safetensors, or shards of at most `shard_bytes` and their index.

    Args:    infos: all tensors, in the order of `tensors`, which are cast to their dtype.
    Returns: bytes of all tensors.
    Raises:  ValueError if a tensor is not the one announced, or overflows its dtype.
    """
    shards = _plan(infos, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    stream = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, stream)
    for name, _ in stream:
        raise ValueError(f"{name} was not announced")
    total = sum(info.nbytes for shard in shards for info in shard)
    if len(shards) > 1:
        weight_map = {i.name: n for n, shard in zip(names, shards, strict=True) for i in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return total


def _plan(infos: Iterable[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _write_shard(
    file: BinaryIO, infos: list[TensorInfo], tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """The format: length of the header, header, bytes. safetensors' own writer wants all at once.
    """  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        start, end = end, end + info.nbytes
        header[info.name] = {
            "dtype": CODES[info.dtype], "shape": info.shape, "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for info in infos:
        name, tensor = next(tensors, ("nothing", torch.empty(0)))
        if (name, tuple(tensor.shape)) != (info.name, info.shape):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} came where {info.name} of {info.shape} was "
                "announced"
            )
        cast = tensor.detach().to("cpu", info.dtype).contiguous()
        if info.dtype == torch.float16 and bool(cast.isinf().any()):
            raise ValueError(f"{name} is too large for float16; use float32 or bfloat16")
        file.write(cast.flatten().view(torch.uint8).numpy().data)
