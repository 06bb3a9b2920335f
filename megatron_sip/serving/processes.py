"""One local server process: start, health, death, end.

Nothing here knows vLLM: a command that answers `/health` and `/v1/models` is a server. Linux only.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_sip.serving import sessions
from megatron_sip.serving.health import ServerFailed, WrongServer, exit_reason, probe
from megatron_sip.serving.ports import free_port, reserve_port
from megatron_sip.serving.server import inherited_environment
from megatron_sip.serving.watchdog import Watchdog

__all__ = ["ServerProcess", "Watchdog", "free_port", "reserve_port"]

SETTLE_S = 0.3
SOCKET_DIR_CHARACTERS = 48  # vLLM's sockets lie deeper; a socket path has 107 at most


class ServerProcess:
    """A local server; the constructor starts it as leader of a session of its own.

    Args of the constructor:
        name: server name in the recipe, which is also the model name it must serve.
        argv, env: command, and environment additions to this process's filtered environment.
        port: what `reserve_port` returned for the port in argv; closed when the server is up.
        log_path: file that stdout and stderr are appended to.
        watchdog: ends the server when this process is gone.
        api_key: bearer token; "" makes one.
    """

    def __init__(
        self,
        name: str,
        *,
        argv: list[str],
        env: Mapping[str, str],
        port: socket.socket,
        log_path: Path,
        watchdog: Watchdog,
        api_key: str = "",
    ) -> None:
        self.name, self.argv, self.log_path = name, argv, log_path
        self.url = f"http://127.0.0.1:{port.getsockname()[1]}"
        self.api_key = api_key or secrets.token_urlsafe(32)
        short = len(tempfile.gettempdir()) <= SOCKET_DIR_CHARACTERS
        folder = tempfile.mkdtemp(prefix=sessions.TEMP_PREFIX, dir=None if short else "/tmp")
        self.temp_dir = Path(folder)
        self._port, self._watchdog = port, watchdog
        self._helpers: list[sessions.Process] = []
        watchdog.add_dir(self.temp_dir, of_server=True)
        environment = inherited_environment(os.environ) | dict(env)
        environment |= {"TMPDIR": str(self.temp_dir), "VLLM_RPC_BASE_PATH": str(self.temp_dir)}
        environment |= {"VLLM_API_KEY": self.api_key, sessions.TOKEN_VARIABLE: watchdog.token}
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._start = sessions.start_time(self.pid)
        watchdog.add(self.pid)

    @property
    def pid(self) -> int:
        """Process id of the leader, which is also the id of its group and session."""
        return self._process.pid

    @property
    def helpers(self) -> list[sessions.Process]:
        """Processes beside the leader that must live as long as it does."""
        return list(self._helpers)

    def members(self) -> list[int]:
        """Process ids of all living processes of this server."""
        return sessions.session_members(self.pid, start=self._start)

    def failure(self) -> str:
        """Why this server is no longer whole; "" while all of its processes live."""
        code = self._process.poll()
        if code is not None:
            return exit_reason(code)
        dead = [p.pid for p in self._helpers if sessions.read_process(p.pid) != p]
        return f"its helper process {dead[0]} died" if dead else ""

    def alive(self) -> bool:
        return not self.failure()

    def check(self) -> None:
        """End all of the server and raise ServerFailed if any part of it died."""
        reason = self.failure()
        if reason:
            raise self._failed(reason)

    def healthy(self) -> bool:
        """Whether the server is up; asks once. Raises: ServerFailed if it died or is wrong."""
        self.check()
        try:
            if probe(self.url, model=self.name, api_key=self.api_key):
                return False
        except WrongServer as error:
            raise self._failed(str(error)) from None
        self._port.close()
        found = [sessions.read_process(pid) for pid in self.members() if pid != self.pid]
        time.sleep(SETTLE_S)  # short-lived helpers of the start-up are gone by then
        self._helpers = [p for p in found if p and sessions.read_process(p.pid) == p]
        self.check()
        return True

    def late(self, timeout_s: float) -> ServerFailed:
        """End the server; the error to raise because it was not up within `timeout_s` seconds."""
        return self._failed(f"not ready after {timeout_s:.0f} s; see startup_timeout_s")

    def stop(self, *, grace_s: float = sessions.GRACE_S) -> None:
        """End every process of this server: SIGTERM, after `grace_s` SIGKILL; delete its files.

        May be called twice. What even SIGKILL does not end stays with the watchdog.
        """
        self._port.close()
        if self.temp_dir.exists() and sessions.end_processes(self.members, grace_s=grace_s):
            self._process.wait()
            self._watchdog.remove(self.pid)
            sessions.delete_folder(str(self.temp_dir))
            self._watchdog.remove_dir(self.temp_dir)

    def _failed(self, reason: str) -> ServerFailed:
        """The error to raise, with the log as it was at the failure; ends the server."""
        error = ServerFailed(
            self.name,
            reason=reason,
            exit_code=self._process.poll(),
            command=self.argv,
            log_path=self.log_path,
        )
        self.stop()
        return error
