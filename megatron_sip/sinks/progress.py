"""How a run is doing, for /health and for the services that want to know how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from megatron_sip.lifetime import Stopped

Status = Literal["running", "stalled", "finished", "stopped", "failed"]


@dataclass
class Progress:
    """A sink that remembers the last step, and a context that notes how the code inside ended.

    Other threads read it.
    """

    phase: Callable[[], str]
    """The open phase, "" between phases."""
    step: int = 0
    """The last one that is done."""
    clock: Callable[[], float] = time.monotonic
    ended: Literal["", "finished", "stopped", "failed"] = ""
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` is done."""
        self.step, self._since = step, self.clock()

    def close(self) -> None:
        """Nothing to do."""

    def health(self, stalled_s: float) -> tuple[bool, dict[str, object]]:
        """Whether all is well, and what to say of it.

        Args: stalled_s: longest time without a step, in seconds.
        """
        waited = self.clock() - self._since
        status: Status = self.ended or ("stalled" if waited > stalled_s else "running")
        return status in ("running", "finished"), {
            "status": status,
            "step": self.step,
            "phase": self.phase(),
            "seconds_since_last_step": round(waited, 3),
        }

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.ended = "finished"
        if kind is not None:
            self.ended = "stopped" if issubclass(kind, Stopped) else "failed"
