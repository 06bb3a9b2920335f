"""What a real exchange and a real asynchronous checkpoint take of the host."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tasks
import torch
from explain_tasks import learner_of, optimizer_tensors
from workers import Context

from megatron_sip import checkpoint, checkpoint_writing
from megatron_sip.config import Config
from megatron_sip.rollout.control import ControlClient
from megatron_sip.rollout.shared_memory import SharedMemorySender
from megatron_sip.rollout.weight_source import MegatronWeightSource
from megatron_sip.types import TrainState


def host_bytes(ctx: Context, config: Config, vocab_size: int, folder: str) -> dict[str, int]:
    """Bytes of this rank: files in shared memory, and tensors that only a save under way holds."""
    learner = learner_of(ctx, config, vocab_size)
    policy, optimizer = learner.policy, learner.optimizer
    policy.ddp.zero_grad_buffer()
    optimizer.step()  # before the first one it holds nothing
    own = {buffer.param_data.untyped_storage().data_ptr() for buffer in policy.grad_buffers}
    own |= set(storages(optimizer_tensors(optimizer)))
    held: list[dict[int, int]] = []
    writer: Any = checkpoint_writing.Writer
    start = writer.start

    def start_measured(self: Any) -> Any:
        held.append(storages(data for _, data in self._items))
        return start(self)

    writer.start = start_measured
    try:
        checkpoint.save(
            Path(folder), policy=policy, optimizer=optimizer, scheduler=learner.scheduler,
            state=TrainState(1, 8, 1, {}, {}), identity=tasks.identity_of(config.model),
            asynchronous=True,
        ).finish()  # fmt: skip
    finally:
        writer.start = start
    (copies,) = held
    assert config.rollout is not None
    source = MegatronWeightSource(
        policy, config.model, ctx.ranks, ctx.platform, vocab_size=vocab_size
    )
    control = ControlClient([], timeout_s=1.0) if ctx.ranks.is_main else None
    sender = SharedMemorySender(source, control, bucket_bytes=config.rollout.bucket_mib * 2**20)
    slots = 0
    if sender.root is not None:
        sender._prepare()
        slots = sum(path.stat().st_blocks * 512 for path in sender.root.iterdir())
        sender.close()
    return {"slots": slots, "copy": sum(n for at, n in copies.items() if at not in own)}


def storages(values: Iterable[Any]) -> dict[int, int]:
    """Bytes of the distinct storages behind those that are tensors, by address."""
    tensors = [value for value in values if torch.is_tensor(value)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
