"""What the shared-memory sender writes and announces. vLLM is not imported here."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_sip.rollout.digest import tensor_digest
from megatron_sip.rollout.weight_source import TensorInfo
from megatron_sip.rollout.weight_transfer import SharedMemorySender, buckets, require_enabled


class Source:
    """A weight source over a dict of tensors."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.passes = 0

    def metadata(self):
        return [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()]

    def __iter__(self):
        self.passes += 1
        yield from self.tensors.items()


class Control:
    """Notes every call, and keeps what a bucket's file held when it was announced."""

    def __init__(self):
        self.calls, self.received, self.names = [], [], []

    def init_weight_transfer_engine(self, init_info):
        self.calls.append(("init", init_info))

    def start_weight_update(self):
        self.calls.append(("start",))

    def update_weights(self, update):
        self.calls.append(("update", update))
        root = self.calls[0][1]["root"]
        self.received.append(load_file(f"{root}/{update['file']}"))

    def finish_weight_update(self, version):
        self.calls.append(("finish", version))


def model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (300, 256), "a": (256, 256), "b": (256,), "c": (64, 64), "head": (1200, 256)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return tensors | {"half": tensors["c"].bfloat16()}


@pytest.fixture
def sender_and_control():
    control = Control()
    sender = SharedMemorySender(Source(model()), control, bucket_mib=1)
    sender.connect()
    yield sender, control
    sender.close()


@pytest.mark.parametrize("limit", [1, 70_000, 262_144, 10**9])
def test_buckets_are_bounded_complete_and_in_order(limit):
    tensors = model()
    found = list(buckets(Source(tensors), limit))
    joined = [(n, t) for bucket in found for n, t in bucket.items()]
    assert [n for n, _ in joined] == list(tensors)
    assert all(torch.equal(t, tensors[n]) and t.dtype == tensors[n].dtype for n, t in joined)
    for bucket in found:
        size = sum(t.numel() * t.element_size() for t in bucket.values())
        assert size <= limit or len(bucket) == 1
    assert not (limit == 10**9 and len(found) > 1)


def test_a_bucket_keeps_the_values_it_was_given():
    tensors = {"a": torch.ones(4)}
    (bucket,) = buckets(Source(tensors), 100)
    tensors["a"].zero_()  # the optimizer's next step
    assert torch.equal(bucket["a"], torch.ones(4))


def test_one_send_writes_every_tensor_with_its_digest_and_leaves_no_file(sender_and_control):
    sender, control = sender_and_control
    version = sender.send(7)
    verbs = [call[0] for call in control.calls]
    assert verbs == ["init", "start", *["update"] * (len(verbs) - 3), "finish"]
    assert len(verbs) > 4  # more than one bucket
    received = {n: t for part in control.received for n, t in part.items()}
    assert received.keys() == model().keys()
    assert all(torch.equal(received[n], t) for n, t in model().items())
    updates = [call[1] for call in control.calls if call[0] == "update"]
    digests = {n: d for update in updates for n, d in update["digests"].items()}
    assert digests == {n: tensor_digest(t) for n, t in model().items()}
    assert {update["num_tensors"] for update in updates} == {len(model())}
    assert control.calls[-1] == ("finish", version)
    assert list(sender.root.iterdir()) == []


def test_the_version_names_the_policy_and_the_bytes():
    def version_of(tensors, version):
        sender = SharedMemorySender(Source(tensors), control := Control(), bucket_mib=1)
        sender.connect()
        try:
            return sender.send(version)
        finally:
            sender.close()
            assert control.calls[-1][0] == "finish"

    first, again, other = version_of(model(), 3), version_of(model(), 3), version_of(model(1), 3)
    assert first == again and first.startswith("3-") and other.startswith("3-")
    assert other != first
    assert version_of(model(), 4).split("-")[1] == first.split("-")[1]


def test_close_removes_the_folder_also_after_a_failed_send(sender_and_control):
    sender, control = sender_and_control

    def fail(update):
        raise RuntimeError("server gone")

    control.update_weights = fail
    with pytest.raises(RuntimeError, match="server gone"):
        sender.send(1)
    assert "finish" not in [call[0] for call in control.calls]
    assert sender.root.is_dir() and sender.root.stat().st_mode & 0o077 == 0
    sender.close()
    assert not sender.root.exists()


def test_a_rank_without_control_only_joins_the_gathers():
    source = Source(model())
    sender = SharedMemorySender(source, None, bucket_mib=1)
    sender.connect()
    assert (sender.send(5), source.passes, sender.root) == ("", 1, None)
    sender.close()


def test_a_digest_covers_bytes_shape_and_dtype():
    tensor = torch.arange(8, dtype=torch.float32)
    variants = [tensor, tensor + 1, tensor.view(2, 4), tensor.view(torch.int32), tensor.bfloat16()]
    assert len({tensor_digest(t) for t in variants}) == len(variants)
    assert tensor_digest(tensor.view(2, 4).T.contiguous().T) == tensor_digest(tensor.view(2, 4))
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor([1.0]))


class Communicator:
    def __init__(self, disabled):
        self.disabled = disabled


@pytest.mark.parametrize("communicator", [None, object(), Communicator(True)])
def test_a_communicator_that_sends_nothing_is_refused(communicator):
    with pytest.raises(RuntimeError, match="disabled"):
        require_enabled(communicator)
    require_enabled(Communicator(False))
