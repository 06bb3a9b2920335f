"""Both ends of the watchdog, which ends our servers when the trainer is gone, however it went.

The helper runs in a session of its own and reads lines from a pipe that only the trainer writes:

    add PID START      watch the session that process PID (start time START, in ticks) leads
    remove PID         forget it
    dir PATH           a temporary folder to delete at the end
    undir PATH         forget it
    quit               the trainer needs nothing more

At `quit`, when the pipe ends, or when the trainer is no longer its parent, it ends every watched
session and every process whose environment carries the token, deletes the folders and exits. A
watched session whose leader died is ended at once. It ignores SIGINT, SIGTERM and SIGHUP. Standard
library only, so that it starts in a moment. Linux only.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

from megatron_sip.serving.sessions import (
    delete_folder,
    end_processes,
    read_process,
    session_members,
    start_time,
    token_members,
)

POLL_S = 1.0
HELPER = (
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
    "from megatron_sip.serving.watchdog import main; main()"
)


class Watchdog:
    """The trainer's end: starts the helper and tells it what to end. Safe in threads."""

    def __init__(self, *, log_path: Path) -> None:
        self.token = secrets.token_hex(16)
        """Servers carry it in the environment variable `sessions.TOKEN_VARIABLE`."""
        self._log_path = log_path
        self._lines: dict[str, str] = {}
        self._lock = threading.RLock()
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def add(self, pgid: int) -> None:
        """Watch the session (and group) that our child `pgid` leads."""
        self._tell(f"add {pgid} {start_time(pgid)}", key=f"add {pgid}")

    def remove(self, pgid: int) -> None:
        self._tell(f"remove {pgid}", forget=f"add {pgid}")

    def add_dir(self, path: Path) -> None:
        """Delete `path` when this process is gone; its name must begin with TEMP_PREFIX."""
        self._tell(f"dir {path}", key=f"dir {path}")

    def remove_dir(self, path: Path) -> None:
        self._tell(f"undir {path}", forget=f"dir {path}")

    def ensure(self) -> None:
        """Start the helper anew, with all it must know, if somebody killed it."""
        with self._lock:
            if self._process.poll() is not None:
                self._process = self._start()
                self._write("".join(f"{line}\n" for line in self._lines.values()))

    def close(self) -> None:
        """Let the helper end what is still registered and exit; takes up to about 12 s then."""
        with self._lock:
            if self._process.poll() is None:
                self._write("quit\n")
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", "-c", HELPER, str(os.getpid()), self.token]
        pipe = subprocess.PIPE
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=log, stderr=log, start_new_session=True
            )

    def _tell(self, line: str, *, key: str = "", forget: str = "") -> None:
        with self._lock:
            self._lines.pop(forget, None)
            self.ensure()
            self._write(line + "\n")
            if key:
                self._lines[key] = line

    def _write(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(text.encode())


def watch(trainer: int, token: str) -> None:
    """The helper's end: watch until the trainer is gone, then clean up."""
    sessions: dict[int, int] = {}
    folders: set[str] = set()
    buffer = b""
    while os.getppid() == trainer:
        if select.select([0], [], [], POLL_S)[0]:
            chunk = os.read(0, 65536)
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                _obey(line.decode(), sessions, folders)
            if not chunk or b"quit" in lines:
                break
        for pid, start in list(sessions.items()):
            leader = read_process(pid)
            if leader is None or leader.start != start:
                end_processes(lambda s=pid, t=start: session_members(s, start=t))
                del sessions[pid]

    def everything() -> list[int]:
        members = [pid for s, t in sessions.items() for pid in session_members(s, start=t)]
        return sorted({*members, *token_members(token)})

    end_processes(everything)
    for folder in folders:
        delete_folder(folder)


def _obey(line: str, sessions: dict[int, int], folders: set[str]) -> None:
    verb, _, rest = line.partition(" ")
    if verb == "add":
        pid, start = map(int, rest.split())
        sessions[pid] = start
    elif verb == "remove":
        sessions.pop(int(rest), None)
    elif verb == "dir":
        folders.add(rest)
    elif verb == "undir":
        folders.discard(rest)


def main() -> None:
    """The helper; `sys.argv[1:]` is the trainer's process id and the token."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watch(int(sys.argv[1]), sys.argv[2])
