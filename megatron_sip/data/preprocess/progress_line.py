"""The progress line: documents, MB/s, tokens/s, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressLine:
    """Counts and rates since the start, or since the process went on."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._start_s = time.monotonic()
        self._documents = self._tokens = self._bytes = 0

    def advance(self, *, documents: int, tokens: int, input_bytes: int) -> None:
        """Count a block."""
        self._documents += documents
        self._tokens += tokens
        self._bytes += input_bytes
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        rates = (
            f"{self._documents:,} documents, {self._bytes / 1e6 / seconds:.2f} MB/s, "
            f"{self._tokens / seconds:,.0f} tokens/s"
        )
        self._progress.update(self._task, advance=input_bytes, rates=rates)


@contextmanager
def progress_line(*, total_bytes: int, done_bytes: int) -> Iterator[ProgressLine]:
    """A line on stderr. Args: total_bytes: of all input files. done_bytes: by earlier runs."""
    columns = (BarColumn(20), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("preprocess", total=total_bytes, completed=done_bytes, rates="")
        yield ProgressLine(progress, task)
