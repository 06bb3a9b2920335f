"""What a person sees: a live panel on a terminal, one line a step elsewhere; and the log files.

Only rank 0 makes a `Console`; the others hold a `SilentConsole`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

import rich.console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SHOWN = (
    ("loss", "loss", ".4f"),
    ("grad_norm", "grad norm", ".3g"),
    ("reward/chosen", "chosen", ".3f"),
    ("reward/rejected", "rejected", ".3f"),
    ("pool/rollout_win_rate", "rollout wins", ".3f"),
    ("rollout/logprob_mismatch", "mismatch", ".1e"),
    ("rollout/tokens_per_s", "tokens/s", ".0f"),
    ("model/mfu", "MFU", ".1%"),
)
NUM_AVERAGED, BAR_WIDTH = 10, 24
_HANDLER = "megatron_sip trainer log"


class StepConsole(Protocol):
    """What the training loop tells whoever watches."""

    def phase(self, name: str) -> None: ...
    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class SilentConsole:
    """A console of a rank that shows nothing."""

    def phase(self, name: str) -> None:
        """A phase begins."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is committed."""

    def note(self, text: str) -> None:
        """Something to tell."""

    def close(self) -> None:
        """The run is over."""

    def __enter__(self) -> SilentConsole:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Console:
    """Live panel if `file` is a terminal, else one plain ASCII line a step.

    Args: file: where to write, standard output by default; clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._title, self._clock = total_steps, title, clock
        self._file = file or sys.stdout
        self._step, self._metrics = 0, {}
        self._last = clock()
        self._phase = ("starting", self._last)
        self._step_s: deque[float] = deque(maxlen=NUM_AVERAGED)
        self._live: Live | None = None
        if self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            terminal = rich.console.Console(
                file=self._file, markup=False, emoji=False, highlight=False
            )
            self._live = Live(get_renderable=self.render, console=terminal, refresh_per_second=4)
            self._live.start()

    def phase(self, name: str) -> None:
        """`name` runs from now on."""
        self._phase = (name, self._clock())

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (1 .. total) is committed; `time/step_s` is used if it was measured."""
        now = self._clock()
        self._step_s.append(metrics.get("time/step_s", now - self._last))
        self._step, self._metrics, self._last = step, dict(metrics), now
        if self._live is None:
            print(self.line(), file=self._file, flush=True)

    def note(self, text: str) -> None:
        """Say something above the panel, or on a line of its own."""
        if self._live is not None:
            self._live.console.print(text)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Leave the last view on the screen; more than once does no harm."""
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self) -> str:
        """`step 12/40 loss 0.6712 ... 9.8 s/step left 04:32`, with the metrics there are."""
        shown = [f"{label} {value}" for label, value in self._values()]
        return " ".join([f"step {self._step}/{self._total}", *shown, *self._pace()])

    def render(self) -> Panel:
        """The panel: progress, the open phase, the last step's times and numbers."""
        phase, since = self._phase
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {self._step}/{self._total}"),
            ProgressBar(total=self._total, completed=self._step, width=BAR_WIDTH),
            Text("  ".join(self._pace())),
        )
        head.add_row(Text("now"), Text(f"{phase} {self._clock() - since:.1f} s"))
        phases = {
            name.removeprefix("time/").removesuffix("_s"): seconds
            for name, seconds in self._metrics.items()
            if name.startswith("time/") and name != "time/step_s"
        }
        longest = max(phases.values(), default=0.0)
        for name, seconds in phases.items():
            width = round(BAR_WIDTH * seconds / longest) if longest > 0 else 0
            head.add_row(Text(name), Text("━" * width, style="cyan"), Text(f"{seconds:.2f} s"))
        for label, value in self._values():
            head.add_row(Text(label), Text(value, style="bold"))
        return Panel(head, title=Text(self._title), expand=False)

    def _values(self) -> list[tuple[str, str]]:
        return [
            (label, format(self._metrics[name], form))
            for name, label, form in SHOWN
            if name in self._metrics
        ]

    def _pace(self) -> list[str]:
        if not self._step_s:
            return []
        seconds = sum(self._step_s) / len(self._step_s)
        minutes, rest = divmod(round(seconds * (self._total - self._step)), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
        return [f"{seconds:.1f} s/step", f"left {left}"]


def setup_logging(run_dir: Path, *, rank: int) -> None:
    """Log to logs/trainer.log (rank 0) or logs/trainer.rankN.log, uncaught exceptions included.

    Call it once the run directory exists. A second call moves the log to the new folder.
    """
    name = "trainer.log" if rank == 0 else f"trainer.rank{rank}.log"
    handler = logging.FileHandler(run_dir / "logs" / name)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.set_name(_HANDLER)
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == _HANDLER]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logging.critical("uncaught exception", exc_info=(kind, error, trace))
    sys.__excepthook__(kind, error, trace)


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
        trace = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        name = arguments.thread.name if arguments.thread else "?"
        logging.critical("uncaught exception in thread %s", name, exc_info=trace)
    threading.__excepthook__(arguments)
