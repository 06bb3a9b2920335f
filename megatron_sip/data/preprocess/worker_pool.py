"""Processes that work on tasks, each with a pipe of its own.

The executors of the standard library and multiprocessing.Pool share one pipe for the results of
all workers: a worker that is killed within a message leaves half of it there, and who reads the
pipe waits for the rest for ever. Here such a pipe has one writer, so its end is seen.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

_UNDER_WAY = 2  # tasks a worker has: the one it works on, and the next one in its pipe

_R = TypeVar("_R")
_Task = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class WorkerDiedError(Exception):
    """A worker ended while it had a task, or before it was given one."""


class WorkerPool:
    """Processes that are given tasks in the order in which these are submitted."""

    def __init__(
        self, workers: int, context: BaseContext, start: Callable[..., None], *arguments: Any
    ) -> None:
        """Start the processes; each calls start(*arguments) first."""
        self._tasks: queue.Queue[_Task | None] = queue.Queue()
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker.launched(self._tasks, context, start, arguments))
        except BaseException:
            self.close()
            raise

    def submit(self, function: Callable[..., _R], *arguments: Any) -> Future[_R]:
        """A task for the first worker that has room; function and arguments can be pickled.

        Returns: its outcome: what the function returns or raises, or WorkerDiedError.
        """
        future: Future[_R] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def close(self) -> None:
        """End the workers, whatever they do. Tasks that they had get WorkerDiedError, others no
        outcome."""
        with suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for worker in self._workers:
            worker.process.kill()
            self._tasks.put(None)
        for worker in self._workers:
            worker.join()


@dataclass(frozen=True, eq=False)
class _Worker:
    """One process, the thread that sends it tasks, and the one that receives its answers.

    Two threads, because a task and an answer may each be larger than what a pipe holds.
    """

    process: BaseProcess
    link: Connection
    tasks: queue.Queue[_Task | None]
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_UNDER_WAY))
    asked: queue.SimpleQueue[Future[Any] | None] = field(default_factory=queue.SimpleQueue)
    threads: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def launched(
        cls,
        tasks: queue.Queue[_Task | None],
        context: BaseContext,
        start: Callable[..., None],
        arguments: tuple[Any, ...],
    ) -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, start, arguments), daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
        process.start()
        theirs.close()  # the worker holds the only other end
        worker = cls(process, ours, tasks)  # pyright: ignore[reportArgumentType]
        for target in (worker.send, worker.receive):
            worker.threads.append(threading.Thread(target=target, daemon=True))
            worker.threads[-1].start()
        return worker

    def send(self) -> None:
        while True:
            self.room.acquire()
            task = self.tasks.get()
            if task is None:
                self.asked.put(None)
                return
            future, function, arguments = task
            try:
                message = ForkingPickler.dumps((function, arguments))
            except Exception as error:
                future.set_exception(error)
                self.room.release()
                continue
            self.asked.put(future)
            with suppress(OSError):  # a dead worker: who receives finds the end of the pipe
                self.link.send_bytes(message)

    def receive(self) -> None:
        while (future := self.asked.get()) is not None:
            try:
                good, answer = self.link.recv()
            except (EOFError, OSError):
                future.set_exception(WorkerDiedError())
            except Exception as error:  # an answer that cannot be unpickled
                future.set_exception(error)
            else:
                future.set_result(answer) if good else future.set_exception(answer)
            self.room.release()

    def join(self) -> None:
        for thread in self.threads:
            thread.join()
        self.process.join()
        self.link.close()


def _serve(link: Connection, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What a worker does: answer tasks until the other end of its pipe is closed."""
    start(*arguments)
    while True:
        try:
            function, inputs = link.recv()
        except EOFError:
            return
        try:
            answer = ForkingPickler.dumps((True, function(*inputs)))
        except Exception as error:
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
            answer = ForkingPickler.dumps((False, error))
        link.send_bytes(answer)
