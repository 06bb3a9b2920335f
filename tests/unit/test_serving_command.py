"""What a server is started with, and who may talk to it."""

import asyncio
import json
from pathlib import Path

import pytest

from megatron_sip.config import StartServer
from megatron_sip.serving.control_auth import ControlAuth
from megatron_sip.serving.server import inherited_environment, server_command

CPU = StartServer(kind="start", model="policy", max_model_len=256, num_threads=3, kv_cache_gib=2)
CUDA = StartServer(kind="start", model="policy", dtype="bfloat16", max_model_len=4096, gpus=(6, 7))


def command(settings, **changes):
    options = {"name": "policy", "model_dir": Path("/models/m"), "port": 1234}
    options |= {"platform_kind": "cpu", "role": "policy", "weight_transfer": "shared_memory"}
    return server_command(settings, **(options | changes))


def test_policy_has_control_routes_and_only_our_plugin():
    argv, env = command(CPU)
    assert "--enable-scale-out" in argv and "--skip-tokenizer-init" in argv
    backend = json.loads(argv[argv.index("--weight-transfer-config") + 1])
    assert backend == {"backend": "shared_memory"}
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert env["VLLM_PLUGINS"] == "megatron_sip_weight_transfer"


def test_text_server_has_neither_control_routes_nor_plugins():
    argv, env = command(CPU, role="text", weight_transfer=None)
    assert "--enable-scale-out" not in argv and "--weight-transfer-config" not in argv
    assert "VLLM_SERVER_DEV_MODE" not in env and env["VLLM_PLUGINS"] == ""


@pytest.mark.parametrize("role", ["policy", "text"])
def test_every_server_is_on_loopback_behind_our_key_check(role):
    argv, env = command(CPU, role=role, weight_transfer="x" if role == "policy" else None)
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv[argv.index("--middleware") + 1].endswith("control_auth.ControlAuth")
    assert "--api-key" not in argv and "VLLM_API_KEY" not in env


def test_cpu_server_has_its_threads_and_is_bound_to_no_core():
    argv, env = command(CPU)
    assert env["OMP_NUM_THREADS"] == "3" and env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert env["OMP_WAIT_POLICY"] == "PASSIVE" and env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert argv[argv.index("--block-size") + 1] == "32" and "--enforce-eager" in argv


def test_cuda_server_sees_its_devices_only():
    argv, env = command(CUDA, platform_kind="cuda", weight_transfer="nccl")
    assert env["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
    assert "--enforce-eager" not in argv and "OMP_NUM_THREADS" not in env


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (CUDA, {}, r"servers.policy.gpus is \[6, 7\]"),
        (CPU, {"platform_kind": "cuda"}, "servers.policy.gpus is empty"),
        (CPU, {"weight_transfer": None}, "the policy needs a backend"),
        (CPU, {"role": "text"}, "a text server must have none"),
    ],
)
def test_contradictions_are_named(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        command(settings, **changes)


def test_server_inherits_nothing_of_torchrun_and_no_key():
    trainer = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "NVTE_FLASH_ATTN": "1", "PATH": "/bin"}
    trainer |= {"OMP_NUM_THREADS": "1", "VLLM_API_KEY": "k", "MEGATRON_SIP_CONTROL_KEY": "k"}
    assert inherited_environment(trainer) == {"PATH": "/bin"}


def answer(path, *, headers, kind="http"):
    """Messages that ControlAuth in front of an app that says 200 sends for one request."""
    sent = []

    async def app(scope, receive, send):
        await send({"status": 200})

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(ControlAuth(app)(scope, receive, send))
    return sent


GOOD = [(b"authorization", b"Bearer secret")]


@pytest.mark.parametrize("variable", ["VLLM_API_KEY", "MEGATRON_SIP_CONTROL_KEY"])
def test_only_the_right_token_passes(monkeypatch, variable):
    monkeypatch.setenv(variable, "secret")
    for path in ("/v1/models", "/pause", "/collective_rpc", "/metrics", "/health/", "/healthz"):
        assert answer(path, headers=GOOD)[0]["status"] == 200
        for wrong in ([], [(b"authorization", b"Bearer x")], [(b"authorization", b"secret")]):
            assert answer(path, headers=wrong)[0]["status"] == 401
        assert answer(path, headers=GOOD * 2)[0]["status"] == 401
    assert answer("/health", headers=[])[0]["status"] == 200


def test_websocket_without_the_token_is_closed(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (message,) = answer("/v1/realtime", headers=[], kind="websocket")
    assert message["type"] == "websocket.close" and message["code"] == 1008


def test_control_auth_refuses_to_work_without_a_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("MEGATRON_SIP_CONTROL_KEY", raising=False)
    with pytest.raises(ValueError, match="ControlAuth needs a key"):
        answer("/pause", headers=GOOD)
