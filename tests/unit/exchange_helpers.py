"""Sender and receivers of a weight exchange in one process, without HTTP and vLLM. Not a test."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from megatron_sip.rollout.control import WeightExchangeFailed
from megatron_sip.rollout.ledger import Announcement, UpdateLedger
from megatron_sip.rollout.receiver import Receiver
from megatron_sip.rollout.shared_memory import SharedMemorySender
from megatron_sip.rollout.weight_source import TensorInfo
from megatron_sip.serving.client import Endpoint


class Source:
    """A weight source over a dict of tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.passes = 0
        self.announced = [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]

    def metadata(self) -> list[TensorInfo]:
        return self.announced

    def __iter__(self):
        self.passes += 1
        yield from list(self.tensors.items())


def small_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Seven tensors, 3,008 bytes: three buckets at a limit of 1,024 bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}": torch.randn(8, 16, generator=generator) for i in range(5)}
    tensors["half"] = torch.randn(8, 13, generator=generator).bfloat16()
    tensors["norm"] = torch.randn(60, generator=generator)
    return tensors


class Server:
    """A server of one worker that keeps what it loads."""

    def __init__(self, name: str) -> None:
        self.name, self.version = name, "default"
        self.ledger = UpdateLedger()
        self.receiver: Receiver | None = None
        self.loaded: dict[str, torch.Tensor] = {}

    def init(self, root: str) -> None:
        self.receiver = Receiver(Path(root), server=self.name, rank=0, ledger=self.ledger)

    def load(self, pairs: Any) -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in pairs}

    def start(self) -> None:
        assert self.receiver is not None
        self.receiver.start()

    def update(self, info: dict[str, Any]) -> None:
        assert self.receiver is not None
        self.receiver.receive(info["file"], Announcement(**info["bucket"]), self.load)

    def finish(self, version: str) -> None:
        assert self.receiver is not None
        self.receiver.finish()
        self.version = version


class Direct:
    """In the place of `ControlClient`: the same calls, delivered to servers in this process."""

    def __init__(self, *servers: Server) -> None:
        self.servers = servers
        self.endpoints = tuple(Endpoint(s.name, "http://127.0.0.1:1", "policy") for s in servers)
        self.failure: WeightExchangeFailed | None = None
        self.calls: list[str] = []

    def world_sizes(self) -> list[int]:
        return [1] * len(self.servers)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        for server in self.servers:
            server.init(init_info["root"])

    def start_weight_update(self) -> None:
        self.calls.append("start")
        for server in self.servers:
            server.start()

    def update_weights(self, info: dict[str, Any]) -> None:
        self.calls.append("update")
        for server in self.servers:
            server.update(info)

    def finish_weight_update(self, version: str) -> None:
        self.calls.append("finish")
        for server in self.servers:
            server.finish(version)

    def fail(
        self, reason: str, *, server: str, phase: str, broken: Collection[str]
    ) -> WeightExchangeFailed:
        self.failure = WeightExchangeFailed(reason, server=server, phase=phase, broken=broken)
        return self.failure


def sender_of(
    control: Direct, tensors: dict[str, torch.Tensor], *, bucket_bytes: int = 1024
) -> SharedMemorySender:
    """Connected; close it."""
    sender = SharedMemorySender(Source(tensors), control, bucket_bytes=bucket_bytes)  # pyright: ignore
    sender.connect()
    return sender


def send(sender: SharedMemorySender, version: int, *, may_equal: bool = False) -> str:
    sender.begin()
    return sender.send(version, may_equal=may_equal)


def act_of(server: Server) -> Any:
    """What a `FakeServer` does with its control routes: what vLLM's worker does with ours."""

    def act(path: str, body: dict[str, Any]) -> None:
        if path == "/init_weight_transfer_engine":
            server.init(body["init_info"]["root"])
        elif path == "/start_weight_update":
            server.start()
        elif path == "/update_weights":
            server.update(body["update_info"])
        elif path == "/finish_weight_update":
            server.finish(body["weight_version"])

    return act
