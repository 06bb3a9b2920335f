"""Servers that answer vLLM's control routes and enforce their order. Not a test."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from megatron_sip.serving.client import Endpoint

AFTER = {  # route -> (state that it needs, state that it leaves)
    "/pause": ("serving", "paused"),
    "/start_weight_update": ("paused", "updating"),
    "/update_weights": ("updating", "updating"),
    "/finish_weight_update": ("updating", "paused"),
    "/resume": ("paused", "serving"),
}


@dataclass
class FakeServer:
    """One server; `calls` is what it was asked, in order: (route, query, body, authorization)."""

    name: str
    key: str = ""
    world_size: int = 1
    fail: dict[str, str] = field(default_factory=dict)  # route -> error, hang, drop, redirect
    calls: list[tuple[str, str, dict[str, Any], str]] = field(default_factory=list)
    state: str = "serving"
    wrong: list[str] = field(default_factory=list)  # calls out of order
    version: str = "default"  # of the weights, as /weight_info says
    act: Callable[[str, dict[str, Any]], dict[str, Any] | None] = lambda path, body: None
    """What else a call does; its answer, or None for the usual one. An error is HTTP 500."""

    def routes(self) -> list[str]:
        return [call[0] for call in self.calls]

    def bodies(self, route: str) -> list[dict[str, Any]]:
        return [call[2] for call in self.calls if call[0] == route]


@contextmanager
def rollout_servers(*servers: FakeServer, together: str = "") -> Iterator[list[Endpoint]]:
    """Yields the servers' endpoints; they run in one thread.

    Args: together: a route that no server answers until all have been asked.
    """
    loop, ready, urls = asyncio.new_event_loop(), threading.Event(), []

    async def answer(server: FakeServer, request: web.Request, everyone: Any) -> web.Response:
        path, text = request.path, await request.text()
        body = json.loads(text) if text else {}
        key = request.headers.get("Authorization", "")
        server.calls.append((path, request.query_string, body, key))
        if path in AFTER:
            need, leave = AFTER[path]
            if server.state != need:
                server.wrong.append(f"{path} while {server.state}")
            server.state = leave
        failure = server.fail.get(path)
        if path == together:
            await everyone.wait()
        if failure == "error":
            return web.Response(status=500, text="engine dead")
        if failure == "redirect":
            return web.Response(status=307, headers={"Location": "/elsewhere"})
        if failure == "hang":
            await asyncio.sleep(30)
        if failure == "drop":
            assert request.transport is not None
            request.transport.abort()
        try:
            found = server.act(path, body)
        except Exception as error:
            return web.Response(status=500, text=f"{type(error).__name__}: {error}")
        if found is not None:
            return web.json_response(found)
        if path == "/finish_weight_update":
            server.version = body["weight_version"]
        return web.json_response(
            {"world_size": server.world_size, "weight_version": server.version}
        )

    async def serve() -> list[web.AppRunner]:
        everyone, runners = asyncio.Barrier(len(servers)), []
        for server in servers:
            app = web.Application()

            async def handle(request: web.Request, server: FakeServer = server) -> web.Response:
                return await answer(server, request, everyone)

            app.router.add_route("*", "/{tail:.*}", handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            runners.append(runner)
        return runners

    def work() -> None:
        runners = loop.run_until_complete(serve())
        loop.call_soon(ready.set)  # not before: a stop must find `run_forever`
        loop.run_forever()
        for runner in runners:
            loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield [Endpoint(s.name, url, "policy", s.key) for s, url in zip(servers, urls, strict=True)]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
