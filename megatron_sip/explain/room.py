"""Whether a run fits this machine: memory and disk by estimate, against what is free now."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_sip.config import Config, StartServer
from megatron_sip.explain.files import Files
from megatron_sip.explain.host import Host
from megatron_sip.explain.memory import FP32, Memory
from megatron_sip.explain.numbers import bytes_text
from megatron_sip.explain.servers import ServerPlan
from megatron_sip.platform import device_memory_bytes
from megatron_sip.preflight import existing
from megatron_sip.rollout.bucket_file import shared_memory
from megatron_sip.serving.server import BATCHED_TOKENS

# Resident memory beside the tensors that are counted, measured in runs of the quickstart.
RANK_BYTES = 0.9 * 2**30
SERVER_BYTES = 1.6 * 2**30
SHOWN = 0.01  # of the whole, what a file must take to be named
LOGITS_COPIES = 2  # of a full batch, where prompts are scored


@dataclass(frozen=True)
class Machine:
    """What is free here, in bytes."""

    memory: int
    """Host memory; on CUDA the memory of one GPU."""
    disk: int
    """Where run.dir is or will be."""
    shared: int
    """Shared memory of the host."""


def this_machine(config: Config) -> Machine | None:
    """None where the recipe's platform is not here, so that nothing can be said."""
    disk = shutil.disk_usage(existing(config.run.dir)).free
    if config.run.max_gib is not None:
        disk = min(disk, round(config.run.max_gib * 2**30) - _held(config.run.dir))
    shared = shutil.disk_usage(shared_memory()).free
    if config.platform.kind == "cpu":
        return Machine(psutil.virtual_memory().available, disk, shared)
    memory = device_memory_bytes()
    return None if memory is None else Machine(memory, disk, shared)


def lacks_room(
    config: Config,
    machine: Machine | None,
    *,
    memory: Sequence[Memory],
    host: Host,
    servers: Sequence[ServerPlan],
    files: Sequence[Files],
) -> tuple[str, ...]:
    """What does not fit, with the numbers and what to do.

    Args: servers: those that start here; () for a replay, which exchanges no weights.
    """
    if machine is None:
        return ()
    found = []
    needed = _memory_needed(config, memory, host, servers)
    total = sum(needed.values())
    if total > machine.memory:
        parts = ", ".join(f"{name} {bytes_text(round(n))}" for name, n in needed.items())
        what = "the run needs" if config.platform.kind == "cpu" else "a rank's GPU needs"
        found.append(
            f"too little memory: {what} about {bytes_text(round(total))} ({parts}), "
            f"{bytes_text(machine.memory)} are available; lower data.micro_batch_size, "
            "servers.NAME.kv_cache_gib or the model's size, or raise the parallel sizes"
        )
    if servers and host.slots > machine.shared:
        found.append(
            f"too little shared memory: weights are exchanged through {bytes_text(host.slots)} in "
            f"{shared_memory()}, {bytes_text(machine.shared)} are free; lower rollout.bucket_mib, "
            "or enlarge it (docker run --shm-size)"
        )
    written = sum(f.bytes_total or 0 for f in files)
    if written > machine.disk + _held(config.run.dir):
        parts = ", ".join(
            f"{f.path} {bytes_text(f.bytes_total)}"
            for f in files
            if f.bytes_total and f.bytes_total > SHOWN * written
        )
        found.append(
            f"too little disk: run.dir {config.run.dir} will hold about {bytes_text(written)} "
            f"({parts}), {bytes_text(machine.disk)} are free; lower checkpoint.keep_last or "
            "run.keep_pools, raise checkpoint.keep_every, or put run.dir elsewhere"
        )
    return tuple(found)


def _held(run_dir: Path) -> int:
    """Bytes that a run to be resumed has written already."""
    return sum(p.stat().st_size for p in run_dir.rglob("*") if p.is_file())


def _memory_needed(
    config: Config, memory: Sequence[Memory], host: Host, servers: Sequence[ServerPlan]
) -> dict[str, float]:
    """Bytes by who needs them: on a CPU of all ranks and servers here, on CUDA of one rank."""
    largest = max(memory, key=lambda m: m.total)
    if config.platform.kind == "cuda":
        return {"tensors of the largest rank": largest.total}
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size))
    needed: dict[str, float] = {f"{ranks} ranks": ranks * (RANK_BYTES + largest.total)}
    if host.checkpoint_copy:
        share = ranks / config.parallel.world_size
        needed["copy of a checkpoint being written"] = share * host.checkpoint_copy
    for server in servers:
        settings = config.servers[server.name]
        if isinstance(settings, StartServer):
            cache = settings.kv_cache_gib * 2**30
            logits = 0
            if server.role == "text" and server.shape is not None:
                logits = LOGITS_COPIES * BATCHED_TOKENS * server.shape.vocab_size * FP32
            weights = server.weights or 0
            needed[f"server {server.name}"] = SERVER_BYTES + weights + cache + logits
    return needed
