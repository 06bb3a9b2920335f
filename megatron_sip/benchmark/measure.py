"""Measuring on this process alone: seconds, interleaved; bytes, exactly; one rank of Megatron."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_sip.config import PlatformConfig
from megatron_sip.platform import Platform, cpu


@contextlib.contextmanager
def one_rank() -> Iterator[Platform]:
    """The CPU platform, and Megatron's process groups of this process alone.

    Threads are those that torch has: OMP_NUM_THREADS, or one for each core.
    """
    platform = cpu(PlatformConfig(kind="cpu", num_threads=torch.get_num_threads()))
    from megatron.core import parallel_state

    store: Any = torch.distributed  # HashStore is not in its list of public names
    dist.init_process_group(platform.backend, store=store.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield platform
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def interleaved_seconds(
    tasks: Mapping[str, Callable[[], Any]], *, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each repetition by task: all tasks once to warm up, then turn and turn about."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repetitions + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], ours: str, plain: str) -> float:
    """Median seconds of `ours` over those of `plain`."""
    return median(seconds[ours]) / median(seconds[plain])


def peak_bytes(task: Callable[[], Any]) -> int:
    """Most bytes of tensors that were alive at once in `task`, less those alive before it.

    Every allocation and release of torch's CPU allocator, as its profiler records them: tensors
    inside an operation count, the packing buffers of the matrix library do not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        task()
    results: Any = recorded.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
