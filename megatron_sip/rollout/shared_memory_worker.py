"""Receiving side of the `shared_memory` backend. Runs inside the vLLM worker, never the trainer.

The trainer writes buckets of Hugging Face tensors as safetensors into one folder of shared memory
and names them with their digests; the worker checks every digest before it loads a tensor, and the
whole update before it publishes. On CPU vLLM repacks linear weights after loading, so an update
runs inside vLLM's layerwise reload. An update that fails half-way leaves the server unusable, as
with every backend: it is restarted, never resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_sip.rollout.digest import tensor_digest


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Folder that the trainer writes to."""

    root: str


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket: a file name inside the folder, and the digest of each tensor in it."""

    file: str
    digests: dict[str, str]
    num_tensors: int  # of the whole update


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads full tensors from files in shared memory."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        root = Path(init_info.root)
        if not root.is_dir():
            raise ValueError(f"weight exchange folder {root} does not exist on this host")
        self._root = root
        self._received: set[str] = set()
        self._expected = 0

    def start_weight_update(self) -> None:
        self._received, self._expected = set(), 0
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Receive one bucket (the base class would synchronise an accelerator)."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        if update_info.file in ("", "..") or Path(update_info.file).name != update_info.file:
            raise ValueError(f"bucket {update_info.file!r} must be a file name without folders")
        self._expected = update_info.num_tensors
        with safe_open(self._root / update_info.file, "pt") as file:
            if set(file.keys()) != set(update_info.digests):
                raise ValueError(f"{update_info.file}: its tensors are not the announced ones")
            model: Any = self.model
            model.load_weights(
                (name, self._checked(name, file.get_tensor(name), digest))
                for name, digest in update_info.digests.items()
            )

    def _checked(self, name: str, tensor: torch.Tensor, digest: str) -> torch.Tensor:
        if tensor_digest(tensor) != digest:
            raise ValueError(f"{name}: received bytes differ from those that were sent")
        if name in self._received:
            raise ValueError(f"{name}: sent twice in one update")
        self._received.add(name)
        return tensor

    def finish_weight_update(self) -> None:
        if not self._received or len(self._received) != self._expected:
            raise ValueError(
                f"update holds {len(self._received)} tensors, {self._expected} were announced"
            )
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...
