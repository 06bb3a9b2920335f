"""Sender and receiver of the `shared_memory` backend against each other; vLLM is imported."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_sip.rollout.digest import tensor_digest
from megatron_sip.rollout.weight_source import TensorInfo
from megatron_sip.rollout.weight_transfer import SharedMemorySender, require_enabled

worker = pytest.importorskip("megatron_sip.rollout.shared_memory_worker")


class Model(torch.nn.Module):
    """Keeps what it is given, as vLLM's models do: by name."""

    def __init__(self):
        super().__init__()
        self.loaded = {}

    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.loaded[name] = tensor.clone()


class Source:
    def __init__(self, tensors):
        self.tensors = tensors

    def metadata(self):
        return [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()]

    def __iter__(self):
        yield from self.tensors.items()


class DirectControl:
    """The control routes without HTTP: what vLLM does with each of them."""

    def __init__(self, engine):
        self.engine, self.version = engine, "default"

    def init_weight_transfer_engine(self, init_info):
        self.engine.init_transfer_engine(worker.SharedMemoryInit(**init_info))

    def start_weight_update(self):
        self.engine.start_weight_update()

    def update_weights(self, update_info):
        self.engine.update_weights(update_info)

    def finish_weight_update(self, weight_version):
        self.engine.finish_weight_update()
        self.version = weight_version


@pytest.fixture
def engine(monkeypatch):
    """The receiving engine with a stub model; `order` says when vLLM's reload begins and ends."""
    order = []
    monkeypatch.setattr(worker, "initialize_layerwise_reload", lambda m: order.append("begin"))
    monkeypatch.setattr(worker, "finalize_layerwise_reload", lambda m, c: order.append("end"))
    settings = SimpleNamespace(parallel_config=None, model_config=None)
    engine = worker.SharedMemoryEngine(None, settings, torch.device("cpu"), Model())
    engine.order = order
    return engine


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(300, 300, generator=generator) for i in range(6)}


@pytest.fixture
def sender(engine):
    control = DirectControl(engine)
    sender = SharedMemorySender(Source(weights()), control, bucket_mib=1)
    sender.connect()
    yield sender
    sender.close()


def test_the_worker_loads_bit_for_bit_what_was_sent_twice_in_a_row(engine, sender):
    for version in (1, 2):
        sender._source.tensors = weights(version)
        published = sender.send(version)
        assert engine.model.loaded.keys() == weights().keys()
        assert all(torch.equal(engine.model.loaded[n], t) for n, t in weights(version).items())
        assert sender._control.version == published and published.startswith(f"{version}-")
        assert list(sender.root.iterdir()) == []
    assert engine.order == ["begin", "end"] * 2


def test_a_missing_tensor_is_refused_before_the_version_is_published(engine, sender):
    class Forgetful(Source):
        def __iter__(self):
            yield from list(self.tensors.items())[:-1]

    sender._source = Forgetful(weights())
    with pytest.raises(ValueError, match="holds 5 tensors, 6 were announced"):
        sender.send(1)
    assert sender._control.version == "default" and engine.order == ["begin"]


def test_an_empty_update_is_refused(engine, sender):
    engine.start_weight_update()
    with pytest.raises(ValueError, match="holds 0 tensors"):
        engine.finish_weight_update()


def announce(sender, tensors, **changes):
    """Write one bucket by hand; the update that announces it."""
    save_file(tensors, sender.root / "bucket.safetensors")
    digests = {n: tensor_digest(t) for n, t in tensors.items()}
    return {"file": "bucket.safetensors", "digests": digests, "num_tensors": 6} | changes


def test_a_tensor_sent_twice_is_refused(engine, sender):
    update = announce(sender, {"layer.0": torch.ones(4)})
    engine.start_weight_update()
    engine.update_weights(update)
    with pytest.raises(ValueError, match=r"layer\.0: sent twice"):
        engine.update_weights(update)


def test_a_new_update_forgets_the_tensors_of_the_last(engine, sender):
    update = announce(sender, {"layer.0": torch.ones(4)}, num_tensors=1)
    for _ in range(2):
        engine.start_weight_update()
        engine.update_weights(update)
        engine.finish_weight_update()


def test_one_changed_bit_is_refused_and_never_reaches_the_model(engine, sender):
    update = announce(sender, {"layer.0": torch.ones(64)})
    file = sender.root / update["file"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    engine.start_weight_update()
    with pytest.raises(ValueError, match=r"layer\.0: received bytes differ"):
        engine.update_weights(update)
    assert not engine.model.loaded


@pytest.mark.parametrize("change", ["another name", "one too many", "one too few"])
def test_tensors_other_than_the_announced_are_refused(change, engine, sender):
    tensors = {"layer.0": torch.ones(4), "layer.1": torch.zeros(4)}
    update = announce(sender, tensors)
    digests = dict(update["digests"])
    if change != "one too many":
        del digests["layer.1"]
    if change != "one too few":
        digests["layer.9"] = tensor_digest(torch.zeros(4))
    engine.start_weight_update()
    with pytest.raises(ValueError, match="not the announced ones"):
        engine.update_weights(update | {"digests": digests})


@pytest.mark.parametrize("path", ["../bucket.safetensors", "/etc/passwd", "a/b", "..", ".", ""])
def test_a_bucket_outside_the_folder_is_refused(path, engine, sender):
    engine.start_weight_update()
    with pytest.raises(ValueError, match="without folders"):
        engine.update_weights(announce(sender, {"layer.0": torch.ones(4)}, file=path))


def test_a_folder_that_is_not_there_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        engine.init_transfer_engine(worker.SharedMemoryInit(str(tmp_path / "gone")))


def test_vllms_communicator_without_nccl_is_refused():
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    group = object.__new__(StatelessProcessGroup)  # no rendezvous: only these two are read
    group.rank, group.world_size = 0, 2
    communicator = PyNcclCommunicator(group, device=torch.device("cpu"))
    assert communicator.disabled
    with pytest.raises(RuntimeError, match="NCCL communicator is disabled"):
        require_enabled(communicator)
