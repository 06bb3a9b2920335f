"""The tensors of a checkpoint, written by a thread of this process and read back.

Megatron-Core's own asynchronous save is not used: its worker process divides by the number of CUDA
devices, gets CPU tensors as shared memory that training goes on changing, and a rank that waits for
a worker that died waits for good; its synchronous save forks this process, threads and all. Here
one thread writes one file a rank, from a copy where training goes on. The files are the same
whether the caller waits or not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonSaveStrategy,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from megatron_sip.checkpoint_files import digest_of

OWN = "optimizer.state."  # gathered for this save alone (`fully_reshardable`): nobody changes them


class CommonStrategy(TorchCommonSaveStrategy):
    """Writes common.pt on rank 0, and keeps a failure until all ranks can be told of it."""

    failure: OSError | None = None

    def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
        self.failure = None
        try:
            super().save_common(common_state_dict, checkpoint_dir)
        except (OSError, RuntimeError) as error:  # torch makes its own of a full disk
            self.failure = OSError(f"{Path(checkpoint_dir) / COMMON_STATE_FNAME}: {error}")


COMMON = CommonStrategy("torch", 1)
register_default_strategy(StrategyAction.SAVE_COMMON, COMMON.backend, COMMON.version, COMMON)


class SaveStrategy(TorchDistSaveShardedStrategy):
    """Plans a save as Megatron-Core does; `writer` is what the last plan will write."""

    def __init__(self, *, changing: bool) -> None:
        """Args: changing: tensors may change while they are written, so they are copied."""
        super().__init__("torch_dist", 1)
        self.writer: Writer | None = None
        self._changing = changing

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        flat, *_ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        writer = self.writer = Writer(checkpoint_dir, changing=self._changing)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        tensors = mcore_to_pyt_state_dict(flat, False)
        writer.plan = save_state_dict_async_plan(tensors, writer, planner=planner)[0]
        return AsyncRequest(None, (), [])


class Writer(FileSystemWriterAsync):
    """Writes this rank's file on a thread."""

    def __init__(self, folder: Any, *, changing: bool) -> None:
        super().__init__(folder)
        self._changing = changing
        self.digests: Mapping[str, str] = {}  # of the file that was written, as it was read back
        self.failure: OSError | None = COMMON.failure
        self.plan: Any = None
        self._items: list[tuple[Any, Any]] = []
        self._written: Future[None] = Future()
        self._results: list[Any] = []
        self._name = ""

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Copy to the host what is on a device or will be changed by the next step."""
        self._items = [
            (item, _at_rest(item, planner.resolve_data(item), self._changing))
            for item in plan.items
        ]
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._name = f"{plan.storage_data.prefix}0.distcp"

    def start(self) -> Future[None]:
        """Begin to write; done when the file is on the disk, or cannot be."""
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._written = executor.submit(self._run)
        executor.shutdown(wait=False)
        return self._written

    def finalize(self) -> None:
        """Write the metadata, once all ranks' files are written; every rank calls it.

        What failed on rank 0 is in its `failure`. Raises: CheckpointException if a rank's file is
        not written; only rank 0's says why.
        """
        save_state_dict_async_finalize(*self.plan)
        if self.failure is None and torch.distributed.get_rank() == 0:
            save_config(CheckpointingConfig("torch_dist"), str(self.checkpoint_dir))

    def _run(self) -> None:
        path, items = Path(self.checkpoint_dir) / self._name, self._items
        self._items = []  # they go with this call
        if not items or self.failure is not None:
            return
        try:
            written = self._write(path, items)
            self.digests = {self._name: digest_of(path, from_disk=True)}
        except OSError as error:
            raise OSError(f"{path}: {error.strerror}") from error
        if self.digests[self._name] != written:
            raise OSError(f"{path}: what was read back is not what was written")

    def _write(self, path: Path, items: list[tuple[Any, Any]]) -> str:
        """Returns: digest of what was handed to the file system."""
        with path.open("wb") as file:
            stream: Any = _Digested(file)
            try:
                self._results = [
                    _write_item(
                        self.transforms, stream, _whole(data), item, self._name,
                        serialization_format=SerializationFormat.TORCH_SAVE,
                    )
                    for item, data in items
                ]  # fmt: skip
            except RuntimeError:  # what torch.save makes of a failed write
                raise stream.failure or RuntimeError(f"{path}: not written") from None
            file.flush()
            os.fsync(file.fileno())
        return stream.digest.hexdigest()

    def retrieve_write_results(self) -> Any:
        failure = self.failure or self._written.exception()
        return self._results if failure is None else _wrap_exception(failure)

    def finish(self, metadata: Any, results: Any) -> None:
        del metadata.all_local_plans  # plans of all ranks, only to be used again by later saves
        try:
            super().finish(metadata, results)
        except OSError as error:  # the others wait to be told that it was written
            self.failure = OSError(f"{self.checkpoint_dir}/.metadata: {error.strerror}")


class _Digested:
    """A file that is written from its begin to its end, with the digest of that."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest = file, xxhash.xxh3_128()
        self.tell, self.flush = file.tell, file.flush
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise


def _at_rest(item: Any, data: Any, changing: bool) -> Any:
    """`data` in host memory, and where it is `changing`, where no training step does."""
    if not isinstance(data, torch.Tensor):
        return data
    data = data.detach()
    if data.device.type != "cpu":
        return data.to("cpu", non_blocking=True)
    return data.clone() if changing and not item.index.fqn.startswith(OWN) else data


def _whole(data: Any) -> Any:
    """A tensor with memory of its own: torch.save would write all that a view is part of."""
    if not isinstance(data, torch.Tensor):
        return data
    view = data.untyped_storage().nbytes() != data.numel() * data.itemsize
    return data.clone() if view else data
