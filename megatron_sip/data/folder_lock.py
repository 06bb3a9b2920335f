"""A working folder for one process alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder if there is none, and lock it; a lock ends with its process at the latest.

    Raises: ValueError if another process has it, or removed it just now; its files stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not _is_claimed(folder, lock):
            raise ValueError(
                f"{folder}: another process is making this dataset; wait for it, or give this one "
                "another name (--output-prefix, --output)"
            )
        yield
    finally:
        os.close(lock)


def _is_claimed(folder: Path, lock: int) -> bool:
    """Whether the lock is ours and the folder still the one that was opened."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())
