"""A sink on a thread of its own: what fails or hangs there neither stops nor delays the run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping

from megatron_sip.metrics import Sink

log = logging.getLogger(__name__)
WAITING_STEPS = 1000  # handed over and not yet logged; later ones are lost
CLOSE_S = 20.0  # for what still waits at the end of the run; torchrun kills 30 s after SIGTERM


class GuardedSink:
    """Hands steps to a sink. The first failure is told, all are logged and counted.

    A failed step is not tried again; the next one is.
    """

    def __init__(
        self,
        name: str,
        sink: Sink,
        note: Callable[[str], None],
        *,
        waiting_steps: int = WAITING_STEPS,
        close_s: float = CLOSE_S,
    ) -> None:
        """Args: note: tells a person something, from any thread."""
        self.name, self.lost = name, 0
        self._sink, self._note, self._close_s = sink, note, close_s
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(
            waiting_steps
        )
        self._counting = threading.Lock()  # both threads lose steps
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Returns at once and never raises."""
        try:
            self._queue.put_nowait((step, metrics))
        except queue.Full:
            self._lose(step, f"{self._queue.maxsize} steps wait for it already")

    def close(self) -> None:
        """Wait for what was handed over, but not for long, and say what was lost."""
        try:
            self._queue.put(None, timeout=self._close_s)
            self._thread.join(self._close_s)
        except queue.Full:
            log.warning("sink %s does not take anything any more", self.name)
        if self._thread.is_alive():
            self._note(
                f"sink {self.name} did not end within {self._close_s:.0f} s; its last steps may "
                "be missing, metrics.jsonl has them"
            )
        if self.lost:
            self._note(f"sink {self.name} lost {self.lost} steps; metrics.jsonl has them")

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            step, metrics = item
            self._try(step, lambda step=step, metrics=metrics: self._sink.log(step, metrics))
        self._try(None, self._sink.close)

    def _try(self, step: int | None, act: Callable[[], None]) -> None:
        """The one handler of any exception in the package (tests/unit/test_architecture.py)."""
        try:
            act()
        except Exception as error:
            self._lose(step, f"{type(error).__name__}: {error}")

    def _lose(self, step: int | None, reason: str) -> None:
        what = "its end" if step is None else f"step {step}"
        log.warning("sink %s lost %s: %s", self.name, what, reason)
        with self._counting:
            self.lost += step is not None
            tell = step is None or self.lost == 1
        if tell:
            self._note(
                f"warning: sink {self.name} lost {what} ({reason}); training goes on, "
                "metrics.jsonl is complete, logs/trainer.log has each loss"
            )
