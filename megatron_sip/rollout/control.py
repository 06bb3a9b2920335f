"""Control client for vLLM's weight-transfer routes, over one or several rollout servers.

vLLM's own client knows one server, sets no version and sends no key. This one calls all servers
at once (their collectives block until everyone has joined), tiles NCCL rank offsets, carries the
bearer token, keeps one deadline for the whole exchange, and allows only the order pause, start,
update, finish, resume. No call is ever retried: a server whose update failed half-way is unusable
until it is restarted, and the client knows which ones are (`broken`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

import aiohttp

from megatron_sip.errors import RunFailed
from megatron_sip.serving.client import Endpoint

NEXT = {
    "serving": {"pause": "paused"},
    "paused": {"start": "updating", "resume": "serving"},
    "updating": {"update": "updating", "finish": "paused"},
    "failed": {},
}
ROUTES = {
    "pause": "/pause?mode=wait&clear_cache=true",
    "start": "/start_weight_update",
    "update": "/update_weights",
    "finish": "/finish_weight_update",
    "resume": "/resume",
}
GRACE_S = 2.0  # after the first failure, for the others' answers


class WeightExchangeFailed(RunFailed):
    """A weight exchange failed; nothing is published, and `broken` servers must be restarted."""

    def __init__(
        self, reason: str, *, server: str = "", phase: str = "", broken: Collection[str] = ()
    ) -> None:
        """Args:
        server: the culprit's name in the recipe; "" if it is not a server.
        phase: "init", "pause", "start", "update", "finish", "resume" or "verify".
        broken: servers that must not serve before they are restarted, the culprit among them.
        """
        super().__init__(f"server {server}: {reason}" if server else reason)
        self.reason, self.server, self.phase = reason, server, phase
        self.broken = tuple(sorted(broken))


class ControlClient:
    """Drives the weight update of all rollout servers as one.

    Fits vLLM's `VLLMWeightSyncClient` protocol, so vLLM's trainer engines can use it.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, timeout_s: float) -> None:
        """Args: timeout_s: of a whole exchange, pause to resume, and of each call outside of it."""
        self.endpoints = tuple(endpoints)
        self.weight_version = ""  # what `finish_weight_update` publishes
        self.seconds: dict[str, float] = {}  # of the last exchange, that each server worked
        self.failure: WeightExchangeFailed | None = None
        self.on_failure: Callable[[], None] = lambda: None  # told at once, in the failed call
        self._timeout_s, self._ends = timeout_s, 0.0
        self._state = "serving"
        self._open: set[str] = set()  # servers between start and finish
        self._published = False

    def replace(self, endpoints: Sequence[Endpoint]) -> None:
        """Go on with these servers after a failure; the broken ones have been restarted.

        Args:   endpoints: all servers again, in their order.
        Raises: WeightExchangeFailed if a broken server was not restarted: it does not say that its
                weights are those of a server that was just started.
        """
        if [e.name for e in endpoints] != [e.name for e in self.endpoints]:
            raise ValueError(
                f"rollout servers {[e.name for e in endpoints]} in place of "
                f"{[e.name for e in self.endpoints]}; give the same names in the same order"
            )
        broken = self.failure.broken if self.failure else ()
        old = {e.name: e for e in self.endpoints}
        restarted = [e for e in endpoints if e.name in broken]
        self._open, self._ends = set(), 0.0
        versions = self._call("GET", "/weight_info", dict.fromkeys(restarted), phase="init")
        for endpoint, reply in zip(restarted, versions, strict=True):
            found = reply["weight_version"]
            if found != "default" or (endpoint == old[endpoint.name] and not self._published):
                reason = (
                    f"a weight exchange failed on it, and it was not restarted: it holds weights "
                    f"{found!r}; restart it"
                )
                raise self.fail(reason, server=endpoint.name, phase="init", broken=broken)
        self.endpoints, self.failure, self._state = tuple(endpoints), None, "serving"

    def world_sizes(self) -> list[int]:
        """Workers of each server."""
        replies = self._call("GET", "/get_world_size", self._same(None), phase="init")
        return [int(reply["world_size"]) for reply in replies]

    def pause(self) -> None:
        """Finish running requests, queue new ones, drop prefix caches; the deadline begins."""
        self._ends, self.seconds = time.monotonic() + self._timeout_s, {}
        self._advance("pause", None)

    def resume(self) -> None:
        """Serve again; only after a finished update."""
        self._advance("resume", None)
        self._ends = 0.0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Prepare the backend: NCCL rank offsets are tiled over the servers; where there are no
        ranks, each server is told its name.
        """
        payloads: dict[Endpoint, Any] = {
            e: {"init_info": init_info | {"server": e.name}} for e in self.endpoints
        }
        if "rank_offset" in init_info:
            offset = int(init_info["rank_offset"])
            for endpoint, size in zip(self.endpoints, self.world_sizes(), strict=True):
                payloads[endpoint] = {"init_info": init_info | {"rank_offset": offset}}
                offset += size
        self._call("POST", "/init_weight_transfer_engine", payloads, phase="init")

    def start_weight_update(self) -> None:
        self._advance("start", None)

    def update_weights(self, update_info: Any) -> None:
        self._advance("update", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Publish; vLLM's engines pass no version, so ours is set before they are called."""
        version = weight_version or self.weight_version
        if not version:
            raise WeightExchangeFailed("an update must not be finished without a version")
        self._advance("finish", {"weight_version": version})
        self._published = True

    def shutdown_weight_transfer_engine(self) -> None:
        """Have every server leave the transfer group.

        After a failure all but the culprit are asked, and one that cannot is broken, too.
        """
        failure, self._ends = self.failure, 0.0
        culprit = failure.server if failure else ""
        payloads = dict.fromkeys(e for e in self.endpoints if e.name != culprit)
        try:
            self._call("POST", "/shutdown_weight_transfer_engine", payloads, phase="shutdown")
        except WeightExchangeFailed as error:
            if failure is None:
                raise
            failure.broken = tuple(sorted({*failure.broken, *error.broken}))
            self.failure = failure

    def _same(self, payload: Any) -> dict[Endpoint, Any]:
        return dict.fromkeys(self.endpoints, payload)

    def _advance(self, action: str, payload: Any) -> None:
        """One step of the exchange on every server at once."""
        if action not in NEXT[self._state]:
            raise WeightExchangeFailed(f"{action} is not allowed while {self._state}", phase=action)
        if action == "start":
            self._open = {e.name for e in self.endpoints}
        self._call("POST", ROUTES[action], self._same(payload), phase=action)
        self._state = NEXT[self._state][action]

    def _call(
        self, method: str, path: str, payloads: dict[Endpoint, Any], *, phase: str
    ) -> list[Any]:
        """One call a server, all at once; replies in order.

        Raises: WeightExchangeFailed for the first failure; the client is failed for good then,
                until `replace`.
        """
        left = self._ends - time.monotonic() if self._ends else self._timeout_s
        if left <= 0:
            reason = f"the deadline of {self._timeout_s:g} s passed before {path} could be sent"
            raise self.fail(reason, phase=phase)
        limit = aiohttp.ClientTimeout(total=left)

        async def everything() -> tuple[dict[str, Any], list[WeightExchangeFailed]]:
            async with aiohttp.ClientSession(timeout=limit) as session:
                return await _at_once(
                    {
                        endpoint.name: self._call_one(session, endpoint, method, path, payload)
                        for endpoint, payload in payloads.items()
                    }
                )

        replies, failures = asyncio.run(everything())
        if phase == "finish":
            self._open -= replies.keys()
        if failures:
            first = failures[0]
            broken = {failure.server for failure in failures}
            raise self.fail(first.reason, server=first.server, phase=phase, broken=broken)
        return [replies[endpoint.name] for endpoint in payloads]

    async def _call_one(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, method: str, path: str, json: Any
    ) -> Any:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        started = time.monotonic()
        try:
            async with session.request(
                method, endpoint.url + path, json=json, headers=headers, allow_redirects=False
            ) as reply:
                text = await reply.text()
                if reply.status == 200:
                    return await reply.json()
                reason = f"{path} answered {reply.status}: {text[:500]}"
        except TimeoutError:
            reason = f"{path} was not answered within the deadline of {self._timeout_s:g} s"
        except aiohttp.ClientError as error:
            reason = f"{path} failed: {type(error).__name__} {error}"
        finally:
            took = time.monotonic() - started
            self.seconds[endpoint.name] = self.seconds.get(endpoint.name, 0.0) + took
        raise WeightExchangeFailed(reason, server=endpoint.name)

    def fail(
        self, reason: str, *, server: str = "", phase: str, broken: Collection[str] = ()
    ) -> WeightExchangeFailed:
        """The failure to raise; nothing may be published or resumed any more."""
        self._state = "failed"
        self.failure = WeightExchangeFailed(
            reason, server=server, phase=phase, broken=self._open.union(broken)
        )
        self.on_failure()
        return self.failure


async def _at_once(
    calls: Mapping[str, Coroutine[Any, Any, Any]],
) -> tuple[dict[str, Any], list[WeightExchangeFailed]]:
    """Replies by server, and the failures in the order in which they came.

    After the first failure the others have a moment left: where it broke a collective, they would
    never answer.
    """
    replies: dict[str, Any] = {}
    failures: list[WeightExchangeFailed] = []

    async def one(name: str, call: Coroutine[Any, Any, Any]) -> None:
        try:
            replies[name] = await call
        except WeightExchangeFailed as failure:
            failures.append(failure)
            raise

    tasks = [asyncio.create_task(one(*item)) for item in calls.items()]
    if not tasks:
        return replies, failures
    _, late = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    if late:
        await asyncio.wait(late, timeout=GRACE_S)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception) and not isinstance(outcome, WeightExchangeFailed):
            raise outcome
    return replies, failures
