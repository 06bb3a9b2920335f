"""vLLM's real NCCL trainer engine, driven on the CPU: only group and broadcast are replaced.

The servers enforce the order of the control routes; `broadcast` consumes the engine's checked
iterator as NCCL's packed producer would.
"""

from dataclasses import dataclass

import pytest
import torch
from fake_rollout_servers import FakeServer, rollout_servers

from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.weight_source import TensorInfo
from megatron_sip.rollout.weight_transfer import NcclSender

nccl_engine = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
INIT = "/init_weight_transfer_engine"


@dataclass
class Group:
    """Stands for vLLM's communicator."""

    disabled: bool = False
    destroyed: bool = False

    def destroy(self):
        self.destroyed = True


class Source:
    def __init__(self):
        self.tensors = {
            "model.embed_tokens.weight": torch.ones(16, 8),
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8, dtype=torch.bfloat16),
            "model.norm.weight": torch.ones(8),
        }
        self.skip = 0

    def metadata(self):
        return [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()]

    def __iter__(self):
        yield from list(self.tensors.items())[self.skip :]


@pytest.fixture
def wire(monkeypatch):
    """What was opened and broadcast."""
    seen = {"opened": [], "sent": [], "options": [], "group": Group()}

    def open_endpoint(info):
        seen["opened"].append((info.master_address, info.master_port, info.world_size))
        return seen["group"]

    def broadcast(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers):
        assert group is seen["group"] and src == 0
        seen["options"].append((buffer_size_bytes, num_buffers))
        seen["sent"].append([(item[0], post_iter_func(item).clone()) for item in iterator])

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_endpoint)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    return seen


def sender_of(endpoints, source, *, rank=0):
    control = ControlClient(endpoints, timeout_s=5.0) if rank == 0 else None
    sender = NcclSender(
        source, control, bucket_mib=3, rank=rank, master_address="10.0.0.1", master_port=5555
    )
    sender.connect()
    return sender, control


def test_two_exchanges_pause_start_update_finish_with_their_versions_and_resume(wire):
    servers = [FakeServer("a", world_size=2), FakeServer("b", world_size=4, key="k")]
    source = Source()
    with rollout_servers(*servers) as endpoints:
        sender, control = sender_of(endpoints, source)
        for version in (1, 2):
            control.pause()
            assert sender.send(version) == f"{version}-nccl"
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


@pytest.mark.parametrize(
    "phase", ["/start_weight_update", "/update_weights", "/finish_weight_update"]
)
def test_a_server_that_fails_stops_the_exchange_and_is_never_resumed(phase, wire):
    servers = [FakeServer("good"), FakeServer("bad", fail={phase: "error"})]
    with rollout_servers(*servers) as endpoints:
        sender, control = sender_of(endpoints, Source())
        control.pause()
        with pytest.raises(WeightExchangeFailed, match=f"server bad: {phase}"):
            sender.send(1)
        with pytest.raises(WeightExchangeFailed, match="resume is not allowed"):
            control.resume()
    assert all("/resume" not in server.routes() for server in servers)


def test_a_stream_that_differs_from_its_announcement_is_never_finished(wire):
    server, source = FakeServer("a"), Source()
    with rollout_servers(server) as endpoints:
        sender, control = sender_of(endpoints, source)
        control.pause()
        source.skip = 1
        with pytest.raises(ValueError, match="disagrees with iteration"):
            sender.send(1)
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
    class Counting(Source):
        passes = 0

        def __iter__(self):
            Counting.passes += 1
            return super().__iter__()

    sender, control = sender_of([], Counting(), rank=1)
    assert control is None and sender.send(4) == "" and Counting.passes == 1
    sender.close()
    assert not wire["opened"] and not wire["sent"]
