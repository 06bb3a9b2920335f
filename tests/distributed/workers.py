"""Four gloo processes that serve all distributed tests and take any layout in turn.

A task is a function of a module in this folder; it gets a `Context` and runs on the first
`tp x pp x dp` processes, between the making and the destruction of their process groups.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_RANKS = 4
TASK_TIMEOUT_S = 240.0
GRACE_S = 10.0  # for the other ranks once one has failed


@dataclass(frozen=True)
class Layout:
    """Sizes of the kinds of parallelism."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1  # within dp

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"TP{self.tp}PP{self.pp}DP{self.dp}" + f"EP{self.ep}" * (self.ep > 1)


@dataclass(frozen=True)
class Context:
    """What a task knows of its process."""

    platform: Any
    ranks: Any
    parallel: Any  # config.Parallel


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, pipe: Connection) -> None:
    """Main of one process: import once, then fork for each task until the pipe closes.

    A process group leaves gloo's threads behind when it is destroyed; with the fork they end.
    """
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer  # noqa: F401

    from megatron_sip.lifetime import die_with_parent

    die_with_parent()
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    while True:
        try:
            layout, port, function, args = pipe.recv()
        except EOFError:
            os._exit(0)  # no atexit work of torch or Megatron-Core
        os.environ |= {"WORLD_SIZE": str(layout.world_size), "MASTER_PORT": str(port)}
        child = os.fork()
        if child == 0:
            die_with_parent()
            try:
                pipe.send((True, _task(layout, function, args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            pipe.send((False, f"the task's process ended with status {status}"))


def _task(layout: Layout, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    from megatron_sip import parallel
    from megatron_sip.config import Parallel, PlatformConfig
    from megatron_sip.platform import cpu

    parallel.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
    settings = Parallel(
        world_size=layout.world_size,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
    )
    platform = cpu(PlatformConfig(kind="cpu"))
    ranks = parallel.initialize(settings, platform, seed=1)
    try:
        return function(Context(platform, ranks, settings), *args)
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class Workers:
    """The processes; use as a context manager."""

    def __enter__(self) -> Workers:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(MAX_RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def run(self, layout: Layout, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function` returns on every rank, in rank order.

        Raises: AssertionError with the traceback of the rank that failed first, or on a time-out;
                the processes are then replaced.
        """
        pipes = self._pipes[: layout.world_size]
        port = free_port()
        for pipe in pipes:
            pipe.send((layout, port, function, args))
        results: dict[Connection, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + TASK_TIMEOUT_S
        while len(results) < len(pipes):
            pending = [p for p in pipes if p not in results]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"{len(pending)} ranks gave no answer in time")
                break
            for pipe in ready:
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process ended"
                results[pipe] = value
                if not ok:
                    failures.append(f"rank {pipes.index(pipe)}: {value}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            for process in self._processes:
                process.kill()
            self.__exit__()
            self.__enter__()
            raise AssertionError(f"{layout}, {function.__name__}: " + "\n".join(failures))
        return [results[pipe] for pipe in pipes]
