"""Checkpoints that hold code under a manifest that matches: refused, and nothing of them is run."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sip import unpickling
from megatron_sip.checkpoint_reading import Reader, check_contents, read_metadata

EXTRA = "decoder.layers.linear_proj._extra_state/shard_0_1"
RAN = Path("/tmp") / f"megatron_sip-ran-{os.getpid()}"
_events: list[tuple[str, Any]] = []
_listening = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event in ("pickle.find_class", "os.system", "compile", "subprocess.Popen"):
        _events.append((event, arguments))


sys.addaudithook(_hook)  # for good: an audit hook cannot be removed


@contextmanager
def refused(said: str) -> Iterator[None]:
    """What is done inside is refused, finds no class that is not listed, and runs nothing."""
    global _listening
    RAN.unlink(missing_ok=True)
    _events.clear()
    _listening = True
    try:
        with pytest.raises(ValueError, match=said):
            yield
    finally:
        _listening = False
    known = unpickling.METADATA | unpickling.FP8_STATE
    assert not [e for e in _events if e[0] != "pickle.find_class" or e[1] not in known]
    assert not RAN.exists()


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {RAN}",)


class Evaluated:
    def __reduce__(self) -> Any:
        return eval, (f"open({str(RAN)!r}, 'w').close()",)


def torch_saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def as_extra_state(data: bytes) -> bytes:
    """What Transformer Engine keeps of a layer: a pickle in a tensor, in Megatron-Core's list."""
    return torch_saved([torch.frombuffer(bytearray(data), dtype=torch.uint8)])


def write(
    folder: Path, *, extra: bytes | None = None, common: bytes | None = None, **changes: Any
) -> Path:
    """A checkpoint of one tensor and one layer's extra state."""
    tensor = torch_saved(torch.zeros(2))
    extra = torch_saved([None]) if extra is None else extra
    (folder / "__0_0.distcp").write_bytes(tensor + extra)
    (folder / "common.pt").write_bytes(torch_saved({"a": 1}) if common is None else common)
    properties = TensorProperties(torch.float32)
    places = {
        MetadataIndex("weight"): _StorageInfo("__0_0.distcp", 0, len(tensor)),
        MetadataIndex(EXTRA): _StorageInfo("__0_0.distcp", len(tensor), len(extra)),
    }
    described = {
        "weight": TensorStorageMetadata(properties, torch.Size([2]), []),
        EXTRA: BytesStorageMetadata(),
    }
    fields: dict[str, Any] = {"state_dict_metadata": described, "storage_data": places}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(**fields | changes)))
    return folder


def place(name: str, offset: int = 0, length: int = 1) -> dict[str, Any]:
    return {"storage_data": {MetadataIndex("weight"): _StorageInfo(name, offset, length)}}


def test_an_honest_checkpoint_is_accepted(tmp_path: Path) -> None:
    check_contents(write(tmp_path))
    state = {"scale_fwd": torch.ones(3), "extra": {"n": 1}}
    check_contents(write(tmp_path, extra=as_extra_state(pickle.dumps(state))))


@pytest.mark.parametrize("code", [Code(), Evaluated()], ids=["system", "eval"])
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside metadata"])
def test_code_in_the_metadata_is_not_run(tmp_path: Path, code: Any, inside: bool) -> None:
    write(tmp_path, planner_data=code if inside else None)
    if not inside:
        (tmp_path / ".metadata").write_bytes(pickle.dumps(code))
    with refused(r"\.metadata is not loaded: it names \w+\.(system|eval)"):
        check_contents(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x10torch.distributed\x8c\x1ccheckpoint.metadata.Metadata\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x0eserialization.os.system\x93.",  # a dotted name
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"",
        b"not a pickle",
    ],
)
def test_other_ways_to_name_a_function_are_refused_too(tmp_path: Path, data: bytes) -> None:
    write(tmp_path)
    (tmp_path / ".metadata").write_bytes(data)
    with refused(r"\.metadata is not loaded"):
        read_metadata(tmp_path)


def test_metadata_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"x" * 100)
    for changes, said in (
        (place("../secret"), "points to ../secret"),
        (place(str(tmp_path / "secret")), "points to /"),
        (place("__0_0.distcp", offset=-5), "points to __0_0.distcp"),
        (place("__0_0.distcp", length=10**9), "points beyond the end"),
        (place("__9_0.distcp"), "No such file"),
    ):
        write(folder, **changes)
        with refused(said):
            read_metadata(folder)


def test_code_in_the_common_state_is_not_run(tmp_path: Path) -> None:
    write(tmp_path, common=torch_saved({"scheduler": Code()}))
    with refused(r"common\.pt is not loaded: it holds more than tensors"):
        check_contents(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        torch_saved([Code()]),
        torch_saved(Code()),
        torch_saved([io.BytesIO(b"x")]),
        torch_saved([{"recipe": 1}]),
        as_extra_state(pickle.dumps(Code())),
        as_extra_state(pickle.dumps({"scale": torch.ones(1), "recipe": Evaluated()})),
        as_extra_state(b"ctorch.storage\n_load_from_bytes\n(B%b%btR." % (
            len(torch_saved(Code())).to_bytes(4, "little"), torch_saved(Code()))),
    ],
    ids=["object", "bare", "stream", "dict", "pickle", "in a pickle", "pickle in a pickle"],
)  # fmt: skip
def test_code_in_a_sharded_object_is_not_run(tmp_path: Path, extra: bytes) -> None:
    write(tmp_path, extra=extra)
    with refused(r"__0_0\.distcp is not loaded: decoder.*_extra_state"):
        check_contents(tmp_path)


def test_torch_must_not_be_told_to_unpickle_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="unset it"):
        unpickling.refuse_unguarded_torch()


def test_torch_still_unpickles_whatever_metadata_names(tmp_path: Path) -> None:
    """Why `mcore_patches.guard_unpickling` is needed; when this fails, look whether it still is."""
    write(tmp_path, planner_data=Counter("ab"))
    assert FileSystemReader(tmp_path).read_metadata().planner_data == Counter("ab")
    with pytest.raises(ValueError, match=r"it names collections\.Counter"):
        Reader(tmp_path).read_metadata()
    assert "weights_only=False" in inspect.getsource(DefaultLoadPlanner.load_bytes)
    assert MCoreLoadPlanner.load_bytes is DefaultLoadPlanner.load_bytes
