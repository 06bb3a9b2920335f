"""Both ends of the watchdog, which ends our servers when the trainer is gone, however it went.

The helper runs in a session of its own and reads lines from a pipe that only the trainer writes:

    add PID START      watch the session that process PID (start time START, in ticks) leads
    remove PID         forget it
    dir PATH           a temporary folder to delete at the end
    keepdir PATH       the same, of a server: an heir of the server keeps it
    undir PATH         forget it
    quit               the trainer needs nothing more

At `quit`, when the pipe ends, or when the trainer is no longer its parent, it ends every watched
session and every process whose environment carries the token, deletes the folders and exits. If
there may be an heir (torchrun lives and starts its ranks anew) it waits for one first, unless it
was told to quit; SIGUSR1 then says that another watchdog has all of it. A watched session whose
leader died is ended at once. It ignores SIGINT, SIGTERM and SIGHUP. Standard library only, so that
it starts in a moment. Linux only.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
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
HEIR_S = 120.0
"""So long servers wait for a trainer that torchrun starts anew."""
HELPER = (
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
    "from megatron_sip.serving.watchdog import main; main()"
)


class Watchdog:
    """The trainer's end: starts the helper and tells it what to end. Safe in threads."""

    def __init__(self, *, log_path: Path, heir: int = 0) -> None:
        """Args: heir: process of the torchrun that may start the trainer anew; 0: nobody does."""
        self.token = secrets.token_hex(16)
        """Servers carry it in the environment variable `sessions.TOKEN_VARIABLE`."""
        self._log_path, self._heir = log_path, heir
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

    def add_dir(self, path: Path, *, of_server: bool = False) -> None:
        """Delete `path` when this process is gone; its name must begin with TEMP_PREFIX.

        Args: of_server: it stays if the server does.
        """
        self._tell(f"{'keepdir' if of_server else 'dir'} {path}", key=f"dir {path}")

    def remove_dir(self, path: Path) -> None:
        self._tell(f"undir {path}", forget=f"dir {path}")

    def ensure(self) -> bool:
        """Start the helper anew, with all it must know, if somebody killed it; whether it was."""
        with self._lock:
            if self._process.poll() is None:
                return False
            self._process = self._start()
            self._write("".join(f"{line}\n" for line in self._lines.values()))
            return True

    def close(self) -> None:
        """Let the helper end what is still registered and exit; takes up to about 12 s then."""
        with self._lock:
            if self._process.poll() is None:
                self._write("quit\n")
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", "-c", HELPER, str(os.getpid()), self.token]
        command += [str(self._heir), str(start_time(self._heir) if self._heir else -1)]
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


def watch(trainer: int, token: str, heir: tuple[int, int]) -> None:
    """The helper's end: watch until the trainer is gone, then wait for an heir or clean up.

    Args: heir: (pid, start time) of the process that may start one; (0, -1): nobody does.
    """
    sessions: dict[int, int] = {}
    folders: dict[str, bool] = {}
    buffer, lines = b"", []
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

    if b"quit" not in lines and _adopted(heir):
        for folder in [f for f, of_server in folders.items() if not of_server]:
            delete_folder(folder)
        return

    def everything() -> list[int]:
        members = [pid for s, t in sessions.items() for pid in session_members(s, start=t)]
        return sorted({*members, *token_members(token)})

    end_processes(everything)
    for folder in folders:
        delete_folder(folder)


def _adopted(heir: tuple[int, int]) -> bool:
    """Wait until another watchdog has all of it, torchrun is gone, or the time is up."""
    deadline = time.monotonic() + HEIR_S
    while time.monotonic() < deadline and start_time(heir[0]) == heir[1] >= 0:
        if signal.SIGUSR1 in signal.sigpending():
            return True
        time.sleep(POLL_S / 10)
    return False


def _obey(line: str, sessions: dict[int, int], folders: dict[str, bool]) -> None:
    verb, _, rest = line.partition(" ")
    if verb == "add":
        pid, start = map(int, rest.split())
        sessions[pid] = start
    elif verb == "remove":
        sessions.pop(int(rest), None)
    elif verb in ("dir", "keepdir"):
        folders[rest] = verb == "keepdir"
    elif verb == "undir":
        folders.pop(rest, None)


def main() -> None:
    """The helper; `sys.argv[1:]` is the trainer's process id, the token, and who starts an heir."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    watch(int(sys.argv[1]), sys.argv[2], (int(sys.argv[3]), int(sys.argv[4])))
