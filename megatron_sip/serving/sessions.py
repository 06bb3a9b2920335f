"""Find and end the processes of a session, and nothing else. Standard library, Linux /proc.

A server is started as the leader of a session of its own; all it starts stays in that session. A
token in the environment finds servers that nobody registered yet. Process numbers are reused, so
every one is paired with its start time.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

GRACE_S = 5.0
TEMP_PREFIX = "megatron_sip-"
TOKEN_VARIABLE = "MEGATRON_SIP_OWNER"
TRACKER = b"multiprocessing.resource_tracker"


class Process(NamedTuple):
    pid: int
    session: int
    start: int
    """Clock ticks between boot and its start: (pid, start) names one process for ever."""


def read_process(pid: int) -> Process | None:
    """The living process `pid`, or None if it is gone or a zombie."""
    fields = _stat(pid)
    if not fields or fields[0] in "ZX":
        return None
    return Process(pid=pid, session=int(fields[3]), start=int(fields[19]))


def start_time(pid: int) -> int:
    """Start of process `pid` in clock ticks since boot, zombies included; -1 if there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else -1


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on, which follow the name in parentheses."""
    return _read(f"/proc/{pid}/stat").decode(errors="replace").rpartition(")")[2].split()


def _read(path: str) -> bytes:
    """Content of a /proc file; empty if the process is gone or another user's."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _processes() -> Iterator[Process]:
    found = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return (process for process in found if process)


def session_members(session: int, *, start: int) -> list[int]:
    """Process ids of the living members of the session led by (session, start)."""
    leader = read_process(session)
    if leader and leader.start != start:  # the number belongs to somebody else by now
        return []
    return [p.pid for p in _processes() if p.session == session and p.start >= start]


def token_members(token: str) -> list[int]:
    """Process ids of the living processes that were started with the owner's token."""
    entry = f"{TOKEN_VARIABLE}={token}".encode()
    pids = [p.pid for p in _processes()]
    return [pid for pid in pids if entry in _read(f"/proc/{pid}/environ").split(b"\0")]


def end_processes(find: Callable[[], list[int]], *, grace_s: float = GRACE_S) -> bool:
    """SIGTERM to what `find` finds, after `grace_s` seconds SIGKILL to what is left.

    Python's resource trackers get one second more than the others: they delete the shared memory
    and semaphores that killed processes left.

    Returns: whether all are gone.
    """
    _signal(find(), signal.SIGTERM)
    if _wait_gone(find, grace_s):
        return True
    trackers = {pid for pid in find() if TRACKER in _read(f"/proc/{pid}/cmdline")}
    _signal([pid for pid in find() if pid not in trackers], signal.SIGKILL)
    if _wait_gone(find, 1.0):
        return True
    _signal(find(), signal.SIGKILL)
    return _wait_gone(find, GRACE_S)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _wait_gone(find: Callable[[], list[int]], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while find():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def delete_folder(path: str) -> None:
    """Delete one of our own temporary folders; anything else is left alone."""
    own = os.path.basename(path).startswith(TEMP_PREFIX) and not os.path.islink(path)
    if own and os.path.isdir(path) and os.stat(path).st_uid == os.getuid():
        shutil.rmtree(path, ignore_errors=True)
