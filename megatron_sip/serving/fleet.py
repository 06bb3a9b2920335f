"""All servers of a run, as rank 0 owns them: start together, watch, start one anew, end all."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from megatron_sip.config import ConnectServer, StartServer, api_key
from megatron_sip.serving.adoption import (
    Handover,
    fits,
    named,
    note,
    note_all,
    take_over,
)
from megatron_sip.serving.client import Endpoint
from megatron_sip.serving.exposure import check_guarded
from megatron_sip.serving.health import ServerFailed, probe_named
from megatron_sip.serving.processes import ServerProcess, Watchdog, reserve_port
from megatron_sip.serving.server import server_command
from megatron_sip.supervision.monitor import PeerLost

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 60.0
POLL_S = 0.25
WATCH_S = 1.0
PROGRESS_S = 5.0


class Fleet:
    """Servers of a run. The constructor starts none; `start` or the `with` statement does.

    Args of the constructor:
        servers: [servers] of the recipe.
        model_dirs: Hugging Face folder of each `start` server.
        log_dir: existing folder for NAME.log and watchdog.log.
        platform_kind: platform.kind.
        policy: names of the rollout servers.
        weight_transfer: vLLM backend of the policy's weight exchange.
        handover: whose servers are taken over, and who may take over these; None: nobody.
    """

    def __init__(
        self,
        servers: Mapping[str, StartServer | ConnectServer],
        *,
        model_dirs: Mapping[str, Path],
        log_dir: Path,
        platform_kind: Literal["cpu", "cuda"],
        policy: tuple[str, ...],
        weight_transfer: str,
        handover: Handover | None = None,
    ) -> None:
        self._handover = handover
        self._starts = {n: s for n, s in servers.items() if isinstance(s, StartServer)}
        self._connects = {n: s for n, s in servers.items() if isinstance(s, ConnectServer)}
        self._model_dirs = dict(model_dirs)
        self._log_dir = log_dir
        self._platform_kind: Literal["cpu", "cuda"] = platform_kind
        self._policy, self._weight_transfer = policy, weight_transfer
        self._running: dict[str, ServerProcess] = {}
        self._watchdog: Watchdog | None = None

    def start(self) -> None:
        """Start every local server at once, or take it over; returns before they are up.

        Raises: ValueError if a server's settings contradict the platform; close the fleet then.
        """
        self._take_over()
        for name in self._starts.keys() - self._running.keys():
            self._launch(name)

    def _take_over(self) -> None:
        """Keep the servers of the attempt before that are just what would be started now."""
        if self._handover is None:
            return
        state = self._handover.state
        for server in take_over(state, log_dir=self._log_dir, watchdog=self._helper()):
            name, port = server.name, int(server.url.rpartition(":")[2])
            if name in self._starts:
                argv, env = self._command(name, port)
                model_dir, policy = self._model_dirs[name], name in self._policy
                if fits(server, argv=argv, env=env, model_dir=model_dir, policy=policy):
                    log.info("server %s goes on from the attempt before", name)
                    self._running[name] = server
                    continue
            server.stop()
        self._note_all()

    def wait(
        self,
        on_wait: Callable[[str, float], None] = lambda name, seconds: None,
        *,
        names: Collection[str] | None = None,
    ) -> None:
        """Wait until every server is up and serves the right model.

        Args:   on_wait: called every 5 s with each waiting server's name and the seconds so far.
                names: of the servers to wait for; None: all.
        Raises: ServerFailed if one dies, serves another model or is late.
        """
        begin = time.monotonic()
        pending = [*self._connects, *self._starts] if names is None else sorted(names)
        told_s = 0.0
        while pending:
            seconds = time.monotonic() - begin
            pending = [name for name in pending if not self.ready(name, seconds)]
            if seconds - told_s >= PROGRESS_S:
                told_s = seconds
                for name in pending:
                    on_wait(name, seconds)
            time.sleep(POLL_S if pending else 0)

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """Where to reach each server by name; a restart changes its url and key."""
        remote = {n: Endpoint(n, s.url, s.model, api_key(s)) for n, s in self._connects.items()}
        local = {n: Endpoint(n, s.url, n, s.api_key) for n, s in self._running.items()}
        return remote | local

    def check(self) -> None:
        """Raises: ServerFailed if a local server died; all of it is ended then. Costs < 1 ms."""
        self.ensure_watchdog()
        for server in self._running.values():
            server.check()

    def ensure_watchdog(self) -> None:
        """Start the watchdog anew if somebody killed it."""
        if self._watchdog and self._watchdog.ensure():
            self._note_all()

    @property
    def local(self) -> dict[str, StartServer]:
        """Settings of the servers that this fleet starts, by name."""
        return dict(self._starts)

    def check_one(self, name: str) -> None:
        """As `check`, for one server."""
        self._running[name].check()

    def relaunch(self, name: str) -> None:
        """End one local server and start it anew, where it was; returns before it is up.

        A text server keeps its key, so that its clients find it again. A policy comes back with
        random weights and a new key: nobody reaches it who was not told.

        Raises: OSError if its port is taken by now.
        """
        old = self._running[name]
        old.stop()
        port = reserve_port(int(old.url.rpartition(":")[2]))
        self._launch(name, port=port, key="" if name in self._policy else old.api_key)

    def close(self) -> None:
        """End every local server, all at once, and the watchdog; may be called twice."""
        running, self._running = self._running, {}
        with ThreadPoolExecutor(max_workers=len(running) + 1) as pool:
            stops = [pool.submit(server.stop) for server in running.values()]
        if self._watchdog:
            self._watchdog.close()
            self._watchdog = None
        for stop in stops:
            stop.result()

    def __enter__(self) -> Fleet:
        try:
            self.start()
        except ValueError:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        heir = self._handover is not None and self._handover.heir
        if not (heir and kind is not None and issubclass(kind, PeerLost)):
            self.close()  # else the watchdog keeps the servers for the next attempt

    def _launch(self, name: str, *, port: socket.socket | None = None, key: str = "") -> None:
        port = port or reserve_port()
        argv, env = self._command(name, port.getsockname()[1])
        log_path = self._log_dir / f"{name}.log"
        self._running[name] = ServerProcess(
            name,
            argv=argv,
            env=env,
            port=port,
            log_path=log_path,
            watchdog=self._helper(),
            api_key=key,
        )

    def _command(self, name: str, port: int) -> tuple[list[str], dict[str, str]]:
        role: Literal["policy", "text"] = "policy" if name in self._policy else "text"
        return server_command(
            self._starts[name],
            name=name,
            model_dir=self._model_dirs[name],
            port=port,
            platform_kind=self._platform_kind,
            role=role,
            weight_transfer=self._weight_transfer if role == "policy" else None,
        )

    def delete_at_end(self, folder: Path) -> None:
        """Have a temporary folder of ours deleted when this process is gone, however it went."""
        self._helper().add_dir(folder)

    def _helper(self) -> Watchdog:
        if self._watchdog is None:
            heir = self._handover.heir if self._handover else 0
            log_path = self._log_dir / "watchdog.log"
            self._watchdog = Watchdog(log_path=log_path, heir=heir)
        return self._watchdog

    def _note(self, name: str) -> None:
        """Write what an heir must know."""
        if self._handover is not None and self._handover.heir:
            server = self._running[name]
            _, env = self._command(name, int(server.url.rpartition(":")[2]))
            note(server, env=env, model_dir=self._model_dirs[name])
            self._note_all()

    def _note_all(self) -> None:
        if self._handover is not None:
            folders = [str(server.temp_dir) for server in self._running.values()]
            note_all(self._handover.state, folders, [named(self._helper())])

    def ready(self, name: str, seconds: float) -> bool:
        """One look at one server, `seconds` after its start.

        Raises: ServerFailed if it died, serves another model or is late.
        """
        if name in self._running:
            server, limit_s = self._running[name], self._starts[name].startup_timeout_s
            ready = server.healthy()
            if not ready and seconds > limit_s:
                raise server.late(limit_s)
            if ready:
                self._note(name)
            return ready
        remote = self._connects[name]
        lacks = probe_named(name, url=remote.url, model=remote.model, api_key=api_key(remote))
        if lacks and seconds > CONNECT_TIMEOUT_S:
            raise ServerFailed(name, reason=f"not reachable for {seconds:.0f} s: {lacks}")
        if not lacks and name in self._policy:
            check_guarded(name, remote.url)
        return not lacks
