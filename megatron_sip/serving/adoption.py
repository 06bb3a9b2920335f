"""Servers that outlive a trainer which torchrun starts anew, and the new trainer that takes them.

A server that is up writes all that is known of it, with its key, into its own temporary folder,
which nobody else may read; `run.dir/servers/live.json` names the folders and the watchdog. When
rank 0 is gone the watchdog waits for an heir, as long as torchrun lives. The heir hands the
sessions to a watchdog of its own, dismisses the old one, keeps what is just what it would start
itself, and ends the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.publish import atomic_write
from megatron_sip.serving import sessions
from megatron_sip.serving.health import get
from megatron_sip.serving.processes import ServerProcess
from megatron_sip.serving.watchdog import Watchdog

RECORD = "server.json"
SMALL_BYTES = 2**20
RELEASE_S = 30.0


@dataclass(frozen=True)
class Handover:
    """How the servers of a run go from one attempt to the next."""

    state: Path
    """run.dir/servers/live.json"""
    heir: int
    """Process of the torchrun that may start an heir; 0: servers end with the trainer."""


class _Foreign:
    """A process that is not our child: nobody tells us how it ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> None:
        return None

    def wait(self) -> None:
        return None


class AdoptedServer(ServerProcess):
    """A living server that another process started; its watchdog is ours from now on."""

    def __init__(self, known: Mapping[str, Any], *, log_path: Path, watchdog: Watchdog) -> None:
        self.name, self.argv, self.log_path = known["name"], known["argv"], log_path
        self.url, self.api_key = known["url"], known["api_key"]
        self.temp_dir = Path(known["temp_dir"])
        self._port = socket.socket()
        self._watchdog = watchdog
        self._process: Any = _Foreign(known["pid"])
        self._start = known["start"]
        self._helpers = [sessions.Process(*helper) for helper in known["helpers"]]
        watchdog.add_dir(self.temp_dir, of_server=True)
        watchdog.add(self.pid)

    def failure(self) -> str:
        process = sessions.read_process(self.pid)
        if process is None or process.start != self._start:
            return f"its process {self.pid} died"
        return super().failure()


def note(server: ServerProcess, *, env: Mapping[str, str], model_dir: Path) -> None:
    """Write what an heir must know of a server that is up."""
    known = {
        "name": server.name,
        "argv": server.argv,
        "env": dict(env),
        "model": model_signature(model_dir),
        "url": server.url,
        "api_key": server.api_key,
        "temp_dir": str(server.temp_dir),
        "pid": server.pid,
        "start": sessions.start_time(server.pid),
        "helpers": server.helpers,
    }
    atomic_write(server.temp_dir / RECORD, json.dumps(known).encode())


def note_all(state: Path, folders: Sequence[str], watchdogs: Sequence[Sequence[Any]]) -> None:
    """Write where the servers' records are, and who watches them: (pid, start, token) of each."""
    content = {"watchdogs": [list(w) for w in watchdogs], "folders": list(folders)}
    atomic_write(state, json.dumps(content).encode())


def named(watchdog: Watchdog) -> tuple[int, int, str]:
    return watchdog.pid, sessions.start_time(watchdog.pid), watchdog.token


def model_signature(folder: Path) -> str:
    """Digest of a model folder: content of small files, size and time of the others."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        status = path.stat()
        large = status.st_size > SMALL_BYTES
        what = f"{status.st_mtime_ns}".encode() if large else path.read_bytes()
        digest.update(f"{path.name}\0{status.st_size}\0".encode() + what)
    return digest.hexdigest()


def left_servers(state: Path) -> dict[str, Any]:
    """Watchdogs of earlier attempts that still wait for an heir, and their servers' folders."""
    try:
        known = json.loads(state.read_text())
    except FileNotFoundError:
        return {"watchdogs": [], "folders": []}
    waiting = [w for w in known["watchdogs"] if sessions.start_time(w[0]) == w[1]]
    return known | {"watchdogs": waiting}


def take_over(state: Path, *, log_dir: Path, watchdog: Watchdog) -> list[AdoptedServer]:
    """All servers of the attempt before that are up, watched by `watchdog` from now on.

    Those that were not up yet are ended. Whenever this process is killed, the state names every
    watchdog that may still end a server.
    """
    left, servers = left_servers(state), []
    if not left["watchdogs"]:
        return []
    note_all(state, left["folders"], [*left["watchdogs"], named(watchdog)])
    for folder in left["folders"]:
        try:
            record = json.loads((Path(folder) / RECORD).read_text())
        except FileNotFoundError:
            continue
        log_path = log_dir / f"{record['name']}.log"
        servers.append(AdoptedServer(record, log_path=log_path, watchdog=watchdog))
    for pid, start, _ in left["watchdogs"]:
        dismiss(pid, start)
    keep = {pid for server in servers for pid in server.members()}
    tokens = [token for *_, token in left["watchdogs"]]
    sessions.end_processes(
        lambda: [p for t in tokens for p in sessions.token_members(t) if p not in keep]
    )
    return servers


def dismiss(pid: int, start: int) -> None:
    """Have an old watchdog leave without ending anything; wait until it is gone."""
    deadline = time.monotonic() + RELEASE_S
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    while (process := sessions.read_process(pid)) is not None and process.start == start:
        if time.monotonic() > deadline:  # it does not wait, but works on something
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def fits(
    server: AdoptedServer, *, argv: list[str], env: Mapping[str, str], model_dir: Path, policy: bool
) -> bool:
    """Whether a living server is what would be started now; a policy must also not be paused, as it
    is when its last weight exchange was cut off."""
    known = json.loads((server.temp_dir / RECORD).read_text())
    same = (known["argv"], known["env"]) == (argv, dict(env))
    if not same or known["model"] != model_signature(model_dir) or not server.alive():
        return False
    return not policy or not is_paused(server)


def is_paused(server: ServerProcess) -> bool:
    """Whether a rollout server answers nobody, or does not say."""
    try:
        status, body = get(server.url, "/is_paused", server.api_key)
        return status != 200 or json.loads(body)["is_paused"]
    except (OSError, http.client.HTTPException, ValueError):
        return True
