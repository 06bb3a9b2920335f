"""Sends the policy's weights to the rollout servers; the only file that imports vLLM's classes.

One exchange: pause -> gather and send -> finish with a version -> resume. A version is
"<policy version>-<digest>"; a server that was just started answers with version "default" and
random weights, so what was never synchronised can neither serve unnoticed nor look right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch

from megatron_sip.rollout.control import ControlClient
from megatron_sip.rollout.weight_source import MegatronWeightSource, TensorInfo


class Sender(Protocol):
    """Moves one version of the weights. Every trainer rank calls all but `close` together."""

    seconds: dict[str, float]
    """Parts of the last `send` that are known: transport, digest, apply."""

    def connect(self) -> None:
        """Prepare the servers' side; again, with new servers or a new group, after a failure."""
        ...

    def begin(self) -> None:
        """An exchange begins: from here to the end of `send` or `abandon` all ranks walk."""
        ...

    def send(self, version: int, *, may_equal: bool) -> str:
        """Start, update, finish.

        Args:    may_equal: the policy has not moved since the last exchange.
        Returns: the published version on rank 0, "" elsewhere.
        """
        ...

    def abandon(self) -> None:
        """After a failure: leave the transfer group and walk the stream to its end, where the
        other ranks wait."""
        ...

    def close(self) -> None: ...


class Walk:
    """The source's stream, one pass an update, which a rank that fails can still walk to its end.

    Every pass gathers over the trainer's ranks: one that stopped in the middle would leave the
    others waiting.
    """

    def __init__(self, source: MegatronWeightSource) -> None:
        self._source, self._begun = source, False
        self._pass: Iterator[tuple[str, torch.Tensor]] | None = None

    def metadata(self) -> list[TensorInfo]:
        return self._source.metadata()

    def begin(self) -> None:
        """A new pass is due."""
        self._begun, self._pass = True, None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._pass = iter(self._source)
        return self._pass

    def finish(self) -> None:
        """Walk what is left of the pass that is due, be it all of it."""
        if self._begun:
            for _ in self if self._pass is None else self._pass:
                pass


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
        next_port: Callable[[], int],
    ) -> None:
        """Args: master_address: of rank 0's host, as every worker reaches it. next_port: a port
        that is free there now.
        """
        self._walk, self._control = Walk(source), control
        self._source = _as_vllm_source(self._walk)
        self._bucket_bytes, self._rank = bucket_mib * 2**20, rank
        self._address, self._next_port = master_address, next_port
        self._engine: Any = None
        self.seconds: dict[str, float] = {}  # vLLM's engine tells nothing of its parts
        if control is not None:
            control.on_failure = self._free

    def connect(self) -> None:
        """Form the NCCL group, on a new port each time; all ranks call it.

        Raises: RuntimeError if NCCL is not usable: vLLM would then send nothing, silently.
        """
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if self._engine is not None:  # a worker that joins anew would keep its old group
            self._free()
            if self._control is not None:
                self._control.shutdown_weight_transfer_engine()
        world_size = 1 + sum(self._control.world_sizes()) if self._control else 0
        self._engine = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=self._address,
                master_port=self._next_port() if self._control else 0,
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

    def begin(self) -> None:
        self._walk.begin()

    def send(self, version: int, *, may_equal: bool) -> str:
        if self._control is not None:
            self._control.weight_version = f"{version}-nccl"
        try:
            self._engine.send_weights()
        except Exception as error:
            if self._control is not None and self._control.failure is not None:
                raise self._control.failure from error  # not the broadcast that it cut off
            raise
        return self._control.weight_version if self._control is not None else ""

    def abandon(self) -> None:
        self._walk.finish()
        self._free()
        if self._control is not None:
            self._control.shutdown_weight_transfer_engine()

    def _free(self) -> None:
        """Abort the group: a broadcast that waits for a server which failed returns at once."""
        if self._engine is not None:
            self._engine.shutdown()

    def close(self) -> None:
        self._free()


def require_enabled(communicator: Any) -> None:
    """Raise unless vLLM's NCCL communicator can send (a disabled one does nothing, silently)."""
    if communicator is None or getattr(communicator, "disabled", True):
        raise RuntimeError(
            "vLLM's NCCL communicator is disabled (libnccl missing, or VLLM_DISABLE_PYNCCL=1): "
            "weights would not be sent; install NCCL and unset the variable"
        )


def _as_vllm_source(source: Walk) -> Any:
    """The same stream as an instance of vLLM's abstract class, which its engines check."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(m.name, m.dtype, m.shape) for m in source.metadata()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(source)

    return Source()
