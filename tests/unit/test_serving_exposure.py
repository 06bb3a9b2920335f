"""A rollout server of another host must refuse control requests that carry no key."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from megatron_sip.serving.control_auth import App, ControlAuth
from megatron_sip.serving.exposure import check_guarded
from megatron_sip.serving.health import ServerFailed
from megatron_sip.serving.ports import free_port

ELSEWHERE = "127.0.0.2"  # this machine, by an address that others might have


async def vllm(scope, receive, send) -> None:
    """Answers every request, as vLLM does on its control routes."""
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b'{"world_size": 1}'})


@pytest.fixture
def serve() -> Iterator:
    servers: list[uvicorn.Server] = []

    def start(app: App, host: str) -> str:
        port = free_port()
        settings = uvicorn.Config(app, host=host, port=port, lifespan="off", log_level="error")
        servers.append(uvicorn.Server(settings))
        threading.Thread(target=servers[-1].run, daemon=True).start()
        while not servers[-1].started:
            time.sleep(0.01)
        return f"http://{host}:{port}"

    yield start
    for server in servers:
        server.should_exit = True


def test_open_control_routes_of_another_host_are_refused(serve) -> None:
    with pytest.raises(ServerFailed, match=r'server "policy".*answers without a key.*ControlAuth'):
        check_guarded("policy", serve(vllm, ELSEWHERE))


def test_guarded_ones_are_accepted(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    check_guarded("policy", serve(ControlAuth(vllm), ELSEWHERE))


def test_a_server_of_this_machine_alone_needs_no_key(serve) -> None:
    check_guarded("policy", serve(vllm, "127.0.0.1"))


def test_a_server_that_is_gone_is_named() -> None:
    with pytest.raises(ServerFailed, match=r'server "policy": GET .*get_world_size'):
        check_guarded("policy", f"http://{ELSEWHERE}:{free_port()}")
