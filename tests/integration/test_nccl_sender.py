"""vLLM's real NCCL trainer engine, driven on the CPU: only group and broadcast are replaced.

The servers enforce the order of the control routes; `broadcast` consumes the engine's checked
iterator as NCCL's packed producer would.
"""

import itertools
import threading
from dataclasses import dataclass, field

import pytest
import torch
from fake_rollout_servers import FakeServer, rollout_servers

from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.weight_source import TensorInfo
from megatron_sip.rollout.weight_transfer import NcclSender

nccl_engine = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
INIT, SHUTDOWN = "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"


@dataclass
class Group:
    """Stands for vLLM's communicator."""

    disabled: bool = False
    destroyed: bool = False
    aborted: threading.Event = field(default_factory=threading.Event)

    def destroy(self):
        self.destroyed = True
        self.aborted.set()


class Source:
    def __init__(self):
        self.walked = []
        self.tensors = {
            "model.embed_tokens.weight": torch.ones(16, 8),
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8, dtype=torch.bfloat16),
            "model.norm.weight": torch.ones(8),
        }
        self.skip = 0

    def metadata(self):
        return [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()]

    def __iter__(self):
        for pair in list(self.tensors.items())[self.skip :]:
            self.walked.append(pair[0])
            yield pair


@pytest.fixture
def wire(monkeypatch):
    """What was opened and broadcast; `hang`: a broadcast waits, as NCCL does for a dead worker."""
    seen = {"opened": [], "sent": [], "options": [], "group": Group(), "hang": False}

    def open_endpoint(info):
        seen["opened"].append((info.master_address, info.master_port, info.world_size))
        seen["group"] = Group(disabled=seen["group"].disabled)
        return seen["group"]

    def broadcast(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers):
        assert group is seen["group"] and src == 0
        seen["options"].append((buffer_size_bytes, num_buffers))
        if seen["hang"]:
            next(iterator)
            assert group.aborted.wait(20), "the broadcast was never aborted"
            raise RuntimeError("NCCL error: aborted")
        seen["sent"].append([(item[0], post_iter_func(item).clone()) for item in iterator])

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_endpoint)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    return seen


def sender_of(endpoints, source, *, rank=0):
    control = ControlClient(endpoints, timeout_s=5.0) if rank == 0 else None
    ports = itertools.count(5555)
    sender = NcclSender(
        source, control, bucket_mib=3, rank=rank, master_address="10.0.0.1",
        next_port=lambda: next(ports),
    )  # fmt: skip
    sender.connect()
    return sender, control


def send(sender, version):
    sender.begin()
    return sender.send(version, may_equal=False)


def test_two_exchanges_pause_start_update_finish_with_their_versions_and_resume(wire):
    servers = [FakeServer("a", world_size=2), FakeServer("b", world_size=4, key="k")]
    source = Source()
    with rollout_servers(*servers) as endpoints:
        sender, control = sender_of(endpoints, source)
        for version in (1, 2):
            control.pause()
            assert send(sender, version) == f"{version}-nccl"
            control.resume()
        sender.close()
    exchange = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    for server in servers:
        assert server.routes() == ["/get_world_size"] * 2 + [INIT] + [*exchange, "/resume"] * 2
        versions = [body["weight_version"] for body in server.bodies("/finish_weight_update")]
        assert versions == ["1-nccl", "2-nccl"] and not server.wrong
        update = server.bodies("/update_weights")[0]["update_info"]
        assert update["names"] == list(source.tensors)
        assert update["dtype_names"] == ["float32", "bfloat16", "float32"]
        assert update["shapes"] == [[16, 8], [8, 8], [8]]
    assert [name for name, _ in wire["sent"][1]] == list(source.tensors)
    assert all(torch.equal(t, source.tensors[n]) for n, t in wire["sent"][1])
    assert wire["options"] == [(3 * 2**20, 2)] * 2 and wire["group"].destroyed


def test_the_group_holds_the_trainer_and_every_worker_once(wire):
    servers = [FakeServer("a", world_size=2), FakeServer("b", world_size=4), FakeServer("c")]
    with rollout_servers(*servers, together=INIT) as endpoints:
        sender_of(endpoints, Source())
    assert wire["opened"] == [("10.0.0.1", 5555, 8)]
    infos = [server.bodies(INIT)[0]["init_info"] for server in servers]
    assert [info["rank_offset"] for info in infos] == [1, 3, 7]
    assert {info["world_size"] for info in infos} == {8}
    assert all(info["packed"] and info["packed_buffer_size_bytes"] == 3 * 2**20 for info in infos)


def exchange(sender, control, version):
    sender.begin()
    control.pause()
    published = sender.send(version, may_equal=False)
    control.resume()
    return published


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4), (4, 4)])
def test_servers_of_any_size_hold_each_version_that_was_sent(sizes, wire):
    servers = [FakeServer(f"s{i}", world_size=size) for i, size in enumerate(sizes)]
    with rollout_servers(*servers, together=INIT) as endpoints:
        sender, control = sender_of(endpoints, Source())
        published = [exchange(sender, control, version) for version in range(3)]
    world_size = 1 + sum(sizes)
    offsets = [server.bodies(INIT)[0]["init_info"]["rank_offset"] for server in servers]
    ranks = [o + r for o, size in zip(offsets, sizes, strict=True) for r in range(size)]
    assert ranks == list(range(1, world_size)) and wire["opened"][0][2] == world_size
    for server in servers:
        versions = [body["weight_version"] for body in server.bodies("/finish_weight_update")]
        assert versions == published and not server.wrong


@pytest.mark.parametrize("failure", ["error", "drop", "hang"])
@pytest.mark.parametrize(
    "phase", ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update",
              "/resume"]
)  # fmt: skip
def test_a_failure_in_any_phase_ends_the_group_and_frees_the_other_servers(phase, failure, wire):
    names, source = ("good", "bad", "other"), Source()
    servers = [FakeServer(n, world_size=2, fail={phase: failure} if n == "bad" else {})
               for n in names]  # fmt: skip
    with rollout_servers(*servers) as endpoints:
        sender, control = sender_of(endpoints, source)
        control._timeout_s = 1.5
        wire["hang"] = phase == "/update_weights"
        with pytest.raises(WeightExchangeFailed, match=f"server bad: {phase}") as found:
            exchange(sender, control, 1)
        sender.abandon()
        with pytest.raises(WeightExchangeFailed, match="not allowed while failed"):
            control.resume()
    error, short = found.value, {"/pause": "pause", "/resume": "resume"}
    assert (error.server, error.phase) == ("bad", short.get(phase, phase[1:].split("_")[0]))
    half_done = phase in ("/start_weight_update", "/update_weights")
    assert error.broken == (tuple(sorted(names)) if half_done else ("bad",))
    assert wire["group"].destroyed and sender._engine.model_update_group is None
    shutdowns = [SHUTDOWN in server.routes() for server in servers]
    assert shutdowns == [True, False, True]
    assert source.walked == list(source.tensors)  # to its end, where the other ranks wait
    if phase != "/resume":
        assert all("/resume" not in server.routes() for server in servers)


@pytest.mark.parametrize("failure", ["error", "drop", "hang"])
def test_a_server_that_cannot_join_the_group_is_named_and_the_others_leave_it(failure, wire):
    servers = [FakeServer("good"), FakeServer("bad", fail={INIT: failure})]
    with rollout_servers(*servers) as endpoints:
        control = ControlClient(endpoints, timeout_s=1.5)
        sender = NcclSender(Source(), control, bucket_mib=3, rank=0, master_address="10.0.0.1",
                            next_port=lambda: 5555)  # fmt: skip
        with pytest.raises(WeightExchangeFailed, match=f"server bad: {INIT}") as found:
            sender.connect()
        sender.abandon()
    assert (found.value.server, found.value.phase) == ("bad", "init")
    assert found.value.broken == ("bad",)
    assert [SHUTDOWN in server.routes() for server in servers] == [True, False]


def test_after_a_restart_the_group_is_formed_anew_on_a_new_port(wire):
    servers = [FakeServer("a", world_size=2), FakeServer("b", fail={"/update_weights": "error"})]
    with rollout_servers(*servers) as endpoints:
        sender, control = sender_of(endpoints, Source())
        with pytest.raises(WeightExchangeFailed):
            exchange(sender, control, 1)
        sender.abandon()
        with pytest.raises(WeightExchangeFailed, match="was not restarted"):
            control.replace(endpoints)
    fresh = [FakeServer("a", world_size=2), FakeServer("b")]
    with rollout_servers(*fresh, together=INIT) as endpoints:
        control.replace(endpoints)
        sender.connect()
        assert exchange(sender, control, 1) == "1-nccl"
    assert [(port, size) for _, port, size in wire["opened"]] == [(5555, 4), (5556, 4)]
    assert [s.bodies(INIT)[0]["init_info"]["master_port"] for s in fresh] == [5556, 5556]
    assert {s.version for s in fresh} == {"1-nccl"}


def test_the_old_group_is_left_before_a_new_one_is_formed(wire):
    server = FakeServer("a", world_size=2)
    with rollout_servers(server) as endpoints:
        sender, control = sender_of(endpoints, Source())
        exchange(sender, control, 1)
        old = wire["group"]
        control.replace(endpoints)  # another server died between two exchanges
        sender.connect()
        assert exchange(sender, control, 1) == "1-nccl"
    assert old.destroyed and not wire["group"].destroyed
    routes = server.routes()
    assert routes.count(INIT) == 2 and routes.count(SHUTDOWN) == 1
    assert routes.index(SHUTDOWN) < len(routes) - 1 - routes[::-1].index(INIT)


def test_a_stream_that_differs_from_its_announcement_is_never_finished(wire):
    server, source = FakeServer("a"), Source()
    with rollout_servers(server) as endpoints:
        sender, control = sender_of(endpoints, source)
        control.pause()
        source.skip = 1
        with pytest.raises(ValueError, match="disagrees with iteration"):
            send(sender, 1)
        with pytest.raises(WeightExchangeFailed):
            control.resume()
    assert "/finish_weight_update" not in server.routes()


def test_a_disabled_communicator_is_refused_at_once(wire):
    wire["group"].disabled = True
    with (
        rollout_servers(FakeServer("a")) as endpoints,
        pytest.raises(RuntimeError, match="disabled"),
    ):
        sender_of(endpoints, Source())


def test_other_ranks_only_join_the_gathers(wire):
    source = Source()
    sender, control = sender_of([], source, rank=1)
    assert control is None and send(sender, 4) == "" and source.walked == list(source.tensors)
    sender.abandon()
    assert source.walked == list(source.tensors)
    sender.close()
    assert not wire["opened"] and not wire["sent"]
