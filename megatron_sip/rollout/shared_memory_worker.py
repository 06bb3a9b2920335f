"""The `shared_memory` backend inside the vLLM worker; never imported by the trainer.

`Receiver` checks what comes; here it meets vLLM's model. On CPU vLLM repacks linear weights after
loading, so an update runs inside vLLM's layerwise reload. An update that fails half-way leaves the
server unusable, as with every backend: it is restarted, never resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_sip.rollout.ledger import Announcement, UpdateLedger
from megatron_sip.rollout.receiver import Receiver


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Folder that the trainer writes to, and this server's name in the recipe."""

    root: str
    server: str


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket: a file name inside the folder, and the fields of its `Announcement`."""

    file: str
    bucket: dict[str, Any]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads full tensors from files in shared memory."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """A trainer that comes anew counts its versions anew; what is broken stays so."""
        root, old = Path(init_info.root), self._receiver
        goes_on = old is not None and (old.root == root or bool(old.ledger.broken))
        ledger = old.ledger if old is not None and goes_on else UpdateLedger()
        rank = self.parallel_config.rank if self.parallel_config is not None else 0
        self._receiver = Receiver(root, server=init_info.server, rank=rank, ledger=ledger)

    def start_weight_update(self) -> None:
        self._ready().start()
        forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Receive one bucket (the base class would synchronise an accelerator)."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        model: Any = self.model
        bucket = Announcement(**update_info.bucket)
        self._ready().receive(update_info.file, bucket, model.load_weights)

    def finish_weight_update(self) -> None:
        self._ready().finish()
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...

    def _ready(self) -> Receiver:
        if self._receiver is None:
            raise ValueError("weights are sent to a worker that no trainer has initialised")
        return self._receiver


def forget_expert_kernels(model: Any) -> None:
    """Have vLLM build the kernels of experts anew from the next weights.

    Reason: on CPU it packs experts' weights where it builds a kernel. A kernel that is kept over a
    reload gets the weights as they came, and computes nonsense with them (vLLM 0.32).
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
