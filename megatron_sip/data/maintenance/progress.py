"""How far a pass over a `.bin` has come: documents, rates and time left, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Watch = Callable[[int, int, int], None]  # documents done, bytes done, bytes in all


def unwatched(documents: int, done_bytes: int, total_bytes: int) -> None:
    """Tell nobody."""


@contextmanager
def progress_line(title: str) -> Iterator[Watch]:
    """A line on stderr while the block runs.

    Args:   title: what is being done.
    Yields: what to call after each piece.
    """
    columns = (TextColumn("{task.description}"), BarColumn(20),
               TextColumn("{task.fields[rates]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True, markup=False)) as progress:
        task = progress.add_task(title, total=None, rates="")
        start_s = time.monotonic()

        def watch(documents: int, done_bytes: int, total_bytes: int) -> None:
            seconds = max(time.monotonic() - start_s, 1e-9)
            rates = (
                f"{documents:,} documents, {documents / seconds:,.0f} documents/s, "
                f"{done_bytes / 1e6 / seconds:,.1f} MB/s"
            )
            progress.update(task, completed=done_bytes, total=total_bytes, rates=rates)

        yield watch
