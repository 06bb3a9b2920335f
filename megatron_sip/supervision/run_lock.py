"""A run directory is one run's alone, as long as its rank 0 lives.

The lock is the kernel's, on `run.dir/lock.json`, and ends with the process, however that ends. It
is on a file and not on the folder: network file systems lock only what is open for writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

FILE = "lock.json"
PATIENCE_S = 10.0
"""So long the process before may take to die."""
POLL_S = 0.1


class RunInUse(OSError):
    """Another process has the run directory; a later try may get it."""


def hold(run_dir: Path, *, patience_s: float = PATIENCE_S) -> int:
    """Make the folder if there is none, and keep it for this process; rank 0 calls it.

    Returns: descriptor of the lock, which no child inherits. Nobody closes it but the kernel.
    Raises:  RunInUse if another process has it after `patience_s` seconds; ValueError if the file
             system has no locks.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience_s
    while not _is_taken(run_dir, lock, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            os.close(lock)
            raise RunInUse(_in_use(run_dir))
        time.sleep(POLL_S)
    held = [lock]  # a child of a child has it no more: the number may be another file's
    os.register_at_fork(after_in_child=lambda: os.close(held.pop()) if held else None)
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    return lock


def refuse_held(run_dir: Path) -> None:
    """Raises: RunInUse if a process has the folder; ValueError as `hold`. Writes nothing."""
    try:
        lock = os.open(run_dir / FILE, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if not _is_taken(run_dir, lock, fcntl.LOCK_SH):
            raise RunInUse(_in_use(run_dir))
    finally:
        os.close(lock)


def _is_taken(run_dir: Path, lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"run.dir {run_dir}: its file system has no locks ({error.strerror}), which keep two "
            "runs apart; mount it with them (Lustre: -o flock), or name a folder elsewhere"
        ) from None
    return True


def _in_use(run_dir: Path) -> str:
    try:
        known = json.loads((run_dir / FILE).read_text())
        who = f"process {known['pid']} on {known['host']}"
    except ValueError:  # it has just taken the lock
        who = "another process"
    return (
        f"run.dir {run_dir} is in use: {who} trains there; wait until it has ended, end its "
        "torchrun, or name another folder (--set run.dir=...)"
    )
