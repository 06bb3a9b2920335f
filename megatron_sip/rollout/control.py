"""Control client for vLLM's weight-transfer routes, over one or several rollout servers.

vLLM's own client knows one server, sets no version and sends no key. This one calls all servers
at once (their collectives block until everyone has joined), tiles NCCL rank offsets, carries the
bearer token, has a deadline, and allows only the order pause, start, update, finish, resume. No
call is ever retried: a server whose update failed half-way is unusable until it is restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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


class WeightExchangeFailed(RunFailed):
    """A control call failed; the servers' weights must be taken as broken."""


class ControlClient:
    """Drives the weight update of all rollout servers as one.

    Fits vLLM's `VLLMWeightSyncClient` protocol, so vLLM's trainer engines can use it.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, timeout_s: float) -> None:
        self._endpoints = tuple(endpoints)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._state = "serving"
        self.weight_version = ""  # what `finish_weight_update` publishes

    def _move(self, action: str) -> None:
        if action not in NEXT[self._state]:
            raise WeightExchangeFailed(f"{action} is not allowed while {self._state}")
        self._state = NEXT[self._state][action]

    async def _call_one(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, method: str, path: str, json: Any
    ) -> Any:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        try:
            async with session.request(
                method, endpoint.url + path, json=json, headers=headers, allow_redirects=False
            ) as reply:
                text = await reply.text()
                if reply.status != 200:
                    raise WeightExchangeFailed(
                        f"server {endpoint.name}: {path} answered {reply.status}: {text[:500]}"
                    )
                return await reply.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WeightExchangeFailed(
                f"server {endpoint.name}: {path} failed: {type(error).__name__} {error}"
            ) from error

    def _call(self, method: str, path: str, payloads: Sequence[Any]) -> list[Any]:
        """One call a server, all at once; the first failure is raised."""

        async def all_servers() -> list[Any]:
            async with aiohttp.ClientSession(timeout=self._timeout) as session:
                return await asyncio.gather(
                    *(
                        self._call_one(session, endpoint, method, path, payload)
                        for endpoint, payload in zip(self._endpoints, payloads, strict=True)
                    )
                )

        try:
            return asyncio.run(all_servers())
        except WeightExchangeFailed:
            self._state = "failed"  # for good: nothing may be published or resumed any more
            raise

    def _same(self, path: str, payload: Any = None) -> list[Any]:
        return self._call("POST", path, [payload] * len(self._endpoints))

    def world_sizes(self) -> list[int]:
        """Workers of each server."""
        replies = self._call("GET", "/get_world_size", [None] * len(self._endpoints))
        return [int(reply["world_size"]) for reply in replies]

    def pause(self) -> None:
        """Finish running requests, queue new ones, drop prefix caches."""
        self._move("pause")
        self._same("/pause?mode=wait&clear_cache=true")

    def resume(self) -> None:
        """Serve again; only after a finished update."""
        self._move("resume")
        self._same("/resume")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Prepare the backend; NCCL rank offsets are tiled over the servers."""
        if "rank_offset" not in init_info:
            self._same("/init_weight_transfer_engine", {"init_info": init_info})
            return
        offset, payloads = int(init_info["rank_offset"]), []
        for size in self.world_sizes():
            payloads.append({"init_info": init_info | {"rank_offset": offset}})
            offset += size
        self._call("POST", "/init_weight_transfer_engine", payloads)

    def start_weight_update(self) -> None:
        self._move("start")
        self._same("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._move("update")
        self._same("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Publish; vLLM's engines pass no version, so ours is set before they are called."""
        version = weight_version or self.weight_version
        if not version:
            raise WeightExchangeFailed("an update must not be finished without a version")
        self._move("finish")
        self._same("/finish_weight_update", {"weight_version": version})

    def shutdown_weight_transfer_engine(self) -> None:
        self._same("/shutdown_weight_transfer_engine")
