"""The `shared_memory` backend as vLLM's worker drives it; vLLM is imported, no server started."""

from types import SimpleNamespace

import pytest
import torch
from exchange_helpers import Direct, Server, send, sender_of, small_weights

from megatron_sip.rollout.ledger import UpdateRefused
from megatron_sip.rollout.weight_transfer import require_enabled

worker = pytest.importorskip("megatron_sip.rollout.shared_memory_worker")


class Model(torch.nn.Module):
    """Keeps what it is given, as vLLM's models do: by name."""

    def __init__(self):
        super().__init__()
        self.loaded = {}

    def load_weights(self, pairs):
        self.loaded |= {name: tensor.clone() for name, tensor in pairs}


class EngineServer(Server):
    """A server whose worker is our vLLM engine."""

    def __init__(self, name, engine):
        super().__init__(name)
        self.engine = engine

    def init(self, root):
        info = self.engine.parse_init_info({"root": root, "server": self.name})
        self.engine.init_transfer_engine(info)

    def start(self):
        self.engine.start_weight_update()

    def update(self, info):
        self.engine.update_weights(info)

    def finish(self, version):
        self.engine.finish_weight_update()
        self.version = version


@pytest.fixture
def engine(monkeypatch):
    """The receiving engine with a stub model; `order` says when vLLM's reload begins and ends."""
    order = []
    monkeypatch.setattr(worker, "initialize_layerwise_reload", lambda m: order.append("begin"))
    monkeypatch.setattr(worker, "finalize_layerwise_reload", lambda m, c: order.append("end"))
    parallel = SimpleNamespace(rank=0)
    settings = SimpleNamespace(parallel_config=parallel, model_config=None)
    engine = worker.SharedMemoryEngine(None, settings, torch.device("cpu"), Model())
    engine.order = order
    return engine


@pytest.fixture
def exchange(engine):
    control = Direct(EngineServer("a", engine))
    sender = sender_of(control, small_weights())
    yield sender, control.servers[0]
    sender.close()


def test_the_worker_loads_bit_for_bit_what_was_sent_twice_in_a_row(engine, exchange):
    sender, server = exchange
    for version in (1, 2):
        sender._source._source.tensors = small_weights(version)
        published = send(sender, version)
        assert engine.model.loaded.keys() == small_weights().keys()
        expected = small_weights(version)
        assert all(torch.equal(engine.model.loaded[n], t) for n, t in expected.items())
        assert server.version == published
    assert engine.order == ["begin", "end"] * 2


def test_a_worker_whose_update_failed_takes_no_other_one_from_any_trainer(engine, exchange):
    sender, server = exchange
    load, engine.model.load_weights = engine.model.load_weights, lambda pairs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        send(sender, 1)
    engine.model.load_weights = load
    sender.abandon()
    with pytest.raises(UpdateRefused, match="a new update after one that failed"):
        send(sender, 2)
    other = sender_of(Direct(server), small_weights())
    with pytest.raises(UpdateRefused, match="restart the server"):
        send(other, 1)
    other.close()
    assert engine.order == ["begin"] and not engine.model.loaded and server.version == "default"


def test_a_new_trainer_counts_its_versions_anew(engine, exchange):
    sender, server = exchange
    send(sender, 9)
    other = sender_of(Direct(server), small_weights(1))
    assert send(other, 0) == server.version
    other.close()


def test_an_update_that_ends_early_is_not_finished(engine, exchange):
    engine.start_weight_update()
    with pytest.raises(UpdateRefused, match=r"ends after 0 of \? buckets"):
        engine.finish_weight_update()
    assert engine.order == ["begin"]


def test_a_worker_without_a_trainer_takes_nothing(engine):
    with pytest.raises(ValueError, match="no trainer has initialised"):
        engine.start_weight_update()


@pytest.mark.parametrize("info", [{"root": "/x"}, {"root": "/x", "server": "a", "more": 1}])
def test_init_info_is_checked(info, engine):
    with pytest.raises(ValueError, match="Invalid init_info"):
        engine.parse_init_info(info)


def test_a_folder_that_is_not_there_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        engine.init_transfer_engine(worker.SharedMemoryInit(str(tmp_path / "gone"), "a"))


def test_vllms_communicator_without_nccl_is_refused():
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    group = object.__new__(StatelessProcessGroup)  # no rendezvous: only these two are read
    group.rank, group.world_size = 0, 2
    communicator = PyNcclCommunicator(group, device=torch.device("cpu"))
    assert communicator.disabled
    with pytest.raises(RuntimeError, match="NCCL communicator is disabled"):
        require_enabled(communicator)
