"""Keeps the servers of a run alive: a thread of rank 0 that starts anew what died.

    starting -> serving                     a text server is up
    starting -> stale -> serving            a rollout server is up with random weights; then the
                                            weight exchange has given it the run's, and verified
    any of these -> dead -> starting        after a pause that doubles
    dead -> given up                        its restarts within the window are spent

A dead text server comes back where it was, with its key: its clients ask again meanwhile. Requests
to a dead rollout server fail at once on every rank (`Heart.is_gone`), and the step's rollouts are
asked for again once all ranks have exchanged weights.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from megatron_sip.serving.client import Endpoint
from megatron_sip.serving.fleet import POLL_S, PROGRESS_S, WATCH_S, Fleet
from megatron_sip.serving.health import ServerFailed, probe
from megatron_sip.supervision.heartbeat import Heart

log = logging.getLogger(__name__)
State = Literal["starting", "stale", "serving", "dead", "given up"]
PROBE_EVERY_S = 10.0
UNHEALTHY_S = 120.0
"""So long a living server may answer no health probe: one core may be all that it has."""
LONGEST_PAUSE_S = 60.0


@dataclass
class Watched:
    """What is known of one local server."""

    max_restarts: int
    window_s: float
    state: State = "starting"
    since: float = 0.0
    """When the state began, or, of a dead one, when it is started anew."""
    answered: float = 0.0
    probed: float = 0.0
    deaths: list[float] = field(default_factory=list)
    was_up: bool = False


class Supervisor:
    """Watches a started fleet. A context; leave it before the fleet.

    Args of the constructor:
        policy: names of the rollout servers. heart: told which servers are gone.
        say: tells a person. clock: seconds that never jump.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        policy: Collection[str],
        heart: Heart,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet, self._policy, self._heart = fleet, frozenset(policy), heart
        self._say, self._clock = say, clock
        now = clock()
        self._servers = {
            name: Watched(s.max_restarts, s.restart_window_s, since=now)
            for name, s in fleet.local.items()
        }
        self._gone: dict[str, int] = {}
        self._deaths = self._settled_deaths = 0
        self._failure: ServerFailed | None = None
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def states(self) -> dict[str, State]:
        return {name: server.state for name, server in self._servers.items()}

    def settle(self, *, broken: Collection[str] = (), reason: str = "") -> bool:
        """Wait until every local server is up.

        Args:    broken: living servers that must be started anew all the same. reason: why.
        Returns: whether any died (or was broken) since the last call.
        Raises:  ServerFailed if the restarts of one are spent.
        """
        with self._lock:
            for name in self._servers.keys() & set(broken):
                if self._servers[name].state in ("serving", "stale"):
                    said = f"its weight exchange failed: {reason}"
                    self._died(name, ServerFailed(name, reason=said))
        begun = told = self._clock()
        while True:
            self.look()
            if self._failure is not None:
                raise self._failure
            waiting = [n for n, s in self._servers.items() if s.state in ("starting", "dead")]
            if not waiting:
                break
            if self._clock() - told >= PROGRESS_S:
                told = self._clock()
                for name in waiting:
                    self._say(f"waiting for server {name}: {told - begun:.0f} s")
                    self._heart.beat(phase=f"wait for server {name}")
            time.sleep(POLL_S)
        with self._lock:
            died = self._deaths != self._settled_deaths
            self._settled_deaths = self._deaths
        return died

    def needs_weights(self) -> bool:
        """Whether a rollout server holds weights that the run did not give it."""
        return "stale" in self.states.values()

    def gone(self) -> dict[str, int]:
        """How often each server went away; for `Heart.accept` once it is back."""
        with self._lock:
            return dict(self._gone)

    def endpoints(self) -> dict[str, Endpoint]:
        return self._fleet.endpoints

    def exchanged(self) -> None:
        """Every rollout server that is up now has the run's weights, and they are verified."""
        with self._lock:
            for name, server in self._servers.items():
                if server.state == "stale":
                    self._move(name, "serving")

    def look(self) -> None:
        """One look at every server; moves each on by one state at most."""
        with self._lock:
            self._fleet.ensure_watchdog()
            for name, server in self._servers.items():
                try:
                    self._advance(name, server)
                except ServerFailed as failure:
                    self._died(name, failure)

    def _run(self) -> None:
        while not self._stop.wait(WATCH_S):
            self.look()

    def _advance(self, name: str, server: Watched) -> None:
        now = self._clock()
        if server.state == "dead" and now >= server.since:
            try:
                self._fleet.relaunch(name)
            except OSError as error:
                raise ServerFailed(name, reason=f"cannot be started anew: {error}") from None
            self._move(name, "starting")
        elif server.state == "starting":
            if self._fleet.ready(name, now - server.since):
                server.answered = server.probed = now
                server.was_up = True
                self._move(name, "stale" if name in self._policy else "serving")
        elif server.state in ("serving", "stale"):
            self._fleet.check_one(name)
            self._probe(name, server, now)

    def _probe(self, name: str, server: Watched, now: float) -> None:
        """Raises: ServerFailed if a living server has not been well for too long."""
        if now - server.probed < PROBE_EVERY_S:
            return
        server.probed = now
        endpoint = self._fleet.endpoints[name]
        lacks = probe(endpoint.url, model=name, api_key=endpoint.api_key)
        if not lacks:
            server.answered = self._clock()
        elif now - server.answered > UNHEALTHY_S:
            waited = f"not healthy for {now - server.answered:.0f} s: {lacks}"
            raise ServerFailed(name, reason=waited)

    def _died(self, name: str, failure: ServerFailed) -> None:
        """Note a death; decide when, and whether, the server is started anew."""
        server, now = self._servers[name], self._clock()
        log.error("%s", failure)
        reason = str(failure).splitlines()[0]
        server.deaths = [t for t in server.deaths if now - t < server.window_s] + [now]
        number = len(server.deaths)
        most = server.max_restarts if server.was_up else min(1, server.max_restarts)
        self._deaths += 1
        if number > most:
            self._move(name, "given up")
            self._failure = self._failure or _spent(failure, server, number - 1)
        else:
            pause_s = min(2.0 ** (number - 1), LONGEST_PAUSE_S)
            self._say(f"{reason}; started anew in {pause_s:.0f} s ({number} of {most} restarts)")
            self._move(name, "dead", at=now + pause_s)
        if name in self._policy or number > most:
            self._gone[name] = self._gone.get(name, 0) + 1
            self._heart.see_gone(self._gone)

    def _move(self, name: str, state: State, *, at: float | None = None) -> None:
        server = self._servers[name]
        if server.state != state:
            log.info("server %s: %s -> %s", name, server.state, state)
        server.state, server.since = state, self._clock() if at is None else at


def _spent(failure: ServerFailed, server: Watched, restarts: int) -> ServerFailed:
    """`failure`, which also says that there is no restart left."""
    if restarts:
        spent = f" (started anew {restarts} times within {server.window_s:.0f} s)"
        first, _, rest = str(failure).partition("\n")
        failure.args = (first + spent + ("\n" + rest if rest else ""),)
    return failure
