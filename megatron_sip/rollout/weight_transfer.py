"""Sends the policy's weights to the rollout servers; the only file that imports vLLM's classes.

One exchange: pause -> gather and send -> finish with a version -> resume. A version is
"<policy version>-<digest>"; a server that was just started answers with version "default" and
random weights, so what was never synchronised can neither serve unnoticed nor look right.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import xxhash
from safetensors.torch import save_file

from megatron_sip.rollout.control import ControlClient
from megatron_sip.rollout.digest import tensor_digest
from megatron_sip.rollout.weight_source import MegatronWeightSource
from megatron_sip.serving.sessions import TEMP_PREFIX


class Sender(Protocol):
    """Moves one version of the weights. Every trainer rank calls `send`."""

    def send(self, version: int) -> str:
        """Start, update, finish; returns the published version on rank 0, "" elsewhere."""
        ...

    def close(self) -> None: ...


def buckets(source: MegatronWeightSource, limit_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Group the stream into pieces of at most `limit_bytes` (a larger tensor stands alone)."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in source:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and size + nbytes > limit_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name], size = tensor.detach().to("cpu", copy=True), size + nbytes
    if bucket:
        yield bucket


class SharedMemorySender:
    """Buckets as safetensors files in shared memory, on one CPU host."""

    def __init__(
        self, source: MegatronWeightSource, control: ControlClient | None, *, bucket_mib: int
    ) -> None:
        self._source, self._control = source, control
        self._limit = bucket_mib * 2**20
        self._root: Path | None = None
        if control is not None:
            shared = Path("/dev/shm")
            self._root = Path(
                tempfile.mkdtemp(
                    prefix=f"{TEMP_PREFIX}{os.getpid()}-", dir=shared if shared.is_dir() else None
                )
            )

    @property
    def root(self) -> Path | None:
        """Folder of the buckets on rank 0; the watchdog removes it if the trainer is killed."""
        return self._root

    def connect(self) -> None:
        """Tell the servers where buckets will be (again after a restart)."""
        if self._control is not None:
            self._control.init_weight_transfer_engine({"root": str(self._root)})

    def send(self, version: int) -> str:
        if self._control is None:
            for _ in self._source:  # join the gathers
                pass
            return ""
        assert self._root is not None
        self._control.start_weight_update()
        total = xxhash.xxh3_64()
        num_tensors = len(self._source.metadata())
        for i, bucket in enumerate(buckets(self._source, self._limit)):
            file = self._root / f"bucket_{i:05d}.safetensors"
            digests = {name: tensor_digest(tensor) for name, tensor in bucket.items()}
            save_file(bucket, file)
            update = {"file": file.name, "digests": digests, "num_tensors": num_tensors}
            self._control.update_weights(update)
            file.unlink()
            total.update("".join(digests.values()).encode())
        published = f"{version}-{total.hexdigest()}"
        self._control.finish_weight_update(published)
        return published

    def close(self) -> None:
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)


class NcclSender:
    """vLLM's native NCCL trainer engine: one group of trainer rank 0 and all workers.

    Written from vLLM 0.32's sources; on CPU only its control calls and checks are tested.
    """

    def __init__(
        self,
        source: MegatronWeightSource,
        control: ControlClient | None,
        *,
        bucket_mib: int,
        rank: int,
        master_address: str,
        master_port: int,
    ) -> None:
        self._source, self._control = _as_vllm_source(source), control
        self._bucket_bytes, self._rank = bucket_mib * 2**20, rank
        self._address, self._port = master_address, master_port
        self._engine: Any = None

    def connect(self) -> None:
        """Form the NCCL group; all ranks call it. `master_port` must be free each time.

        Raises: RuntimeError if NCCL is not usable: vLLM would then send nothing, silently.
        """
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        world_size = 1 + sum(self._control.world_sizes()) if self._control else 0
        self._engine = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=self._address,
                master_port=self._port,
                world_size=world_size,
                packed=True,
                packed_buffer_size_bytes=self._bucket_bytes,
                packed_num_buffers=2,
                rank=self._rank,
            ),
            client=cast(Any, self._control),  # None on ranks that send nothing and never call it
            source=self._source,
        )
        if self._rank == 0:
            require_enabled(self._engine.model_update_group)

    def send(self, version: int) -> str:
        if self._control is not None:
            self._control.weight_version = f"{version}-nccl"
        self._engine.send_weights()
        return self._control.weight_version if self._control is not None else ""

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()


def require_enabled(communicator: Any) -> None:
    """Raise unless vLLM's NCCL communicator can send (a disabled one does nothing, silently)."""
    if communicator is None or getattr(communicator, "disabled", True):
        raise RuntimeError(
            "vLLM's NCCL communicator is disabled (libnccl missing, or VLLM_DISABLE_PYNCCL=1): "
            "weights would not be sent; install NCCL and unset the variable"
        )


def _as_vllm_source(source: MegatronWeightSource) -> Any:
    """The same stream as an instance of vLLM's abstract class, which its engines check."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(m.name, m.dtype, m.shape) for m in source.metadata()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(source)

    return Source()
