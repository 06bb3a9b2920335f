"""What the shared-memory sender announces, and that every worker must confirm what it loaded."""

import json

import pytest
import torch
from exchange_helpers import Direct, Server, Source, send, sender_of, small_weights

from megatron_sip.rollout.control import WeightExchangeFailed
from megatron_sip.rollout.digest import tensor_digest
from megatron_sip.rollout.ledger import UpdateRefused
from megatron_sip.rollout.receiver import receipt_path
from megatron_sip.rollout.shared_memory import SharedMemorySender


class Noting(Direct):
    """Keeps the announcements."""

    def __init__(self, *servers):
        super().__init__(*servers)
        self.updates = []

    def update_weights(self, info):
        self.updates.append(info)
        super().update_weights(info)


@pytest.fixture
def exchange():
    control = Noting(Server("a"), Server("b"))
    sender = sender_of(control, small_weights())
    yield sender, control
    sender.close()


def test_two_updates_reach_every_server_bit_for_bit_in_bounded_buckets(exchange):
    sender, control = exchange
    for version in (3, 4):
        sender._source._source.tensors = small_weights(version)
        published = send(sender, version)
        for server in control.servers:
            assert server.version == published and server.loaded.keys() == small_weights().keys()
            assert all(torch.equal(server.loaded[n], t) for n, t in small_weights(version).items())
        assert published.split("-") == [str(version), server.ledger.whole]
        assert {p.name for p in sender.root.iterdir()} == {"slot_0.safetensors",
                                                           "slot_1.safetensors"}  # fmt: skip
    once = ["start", *["update"] * 3, "finish"]
    assert control.calls == ["init", *once, *once]
    assert min(sender.seconds.values()) > 0


def test_every_bucket_names_its_update_its_turn_and_its_digests(exchange):
    sender, control = exchange
    send(sender, 7)
    buckets = [update["bucket"] for update in control.updates]
    assert [b["index"] for b in buckets] == [0, 1, 2] and {b["count"] for b in buckets} == {3}
    assert {(b["version"], b["num_tensors"]) for b in buckets} == {(7, 7)}
    assert len({b["update"] for b in buckets}) == 1
    digests = {name: digest for b in buckets for name, digest in b["digests"].items()}
    assert digests == {n: tensor_digest(t) for n, t in small_weights().items()}
    assert [bool(b["whole"]) for b in buckets] == [False, False, True]


def test_the_version_names_the_policy_and_the_bytes():
    def version_of(tensors, version):
        sender = sender_of(Direct(Server("a")), tensors)
        try:
            return send(sender, version)
        finally:
            sender.close()

    first, again, other = (version_of(small_weights(s), 3) for s in (0, 0, 1))
    assert first == again and first.startswith("3-") and other.startswith("3-")
    assert other != first
    assert version_of(small_weights(), 4).split("-")[1] == first.split("-")[1]


def test_weights_that_did_not_change_though_the_policy_moved_are_refused(exchange):
    sender, control = exchange
    send(sender, 1)
    published = send(sender, 2, may_equal=True)
    assert published.startswith("2-") and control.servers[0].version == published
    with pytest.raises(UpdateRefused, match="version 3 brings the bytes of version 2, though"):
        send(sender, 3)
    assert control.servers[0].version == published


def test_the_same_version_may_be_sent_again_to_all_when_one_server_was_restarted(exchange):
    sender, control = exchange
    published = send(sender, 5)
    control.servers[1].ledger = type(control.servers[1].ledger)()  # a new process
    sender.connect()
    assert send(sender, 5) == published == control.servers[1].version
    sender._source._source.tensors = small_weights(1)
    send(sender, 5)  # sync_interval above 1: the policy went on since
    with pytest.raises(UpdateRefused, match="version 4 is older than 5"):
        send(sender, 4)


class Idle(Server):
    """Answers everything and does nothing."""

    def update(self, info):
        pass

    def finish(self, version):
        self.version = version


class Forging(Server):
    """Loads one update and says that it loaded the next one, too."""

    def update(self, info):
        super().update(info | {"bucket": info["bucket"]})
        assert self.receiver is not None
        path = receipt_path(self.receiver.root, info["bucket"]["update"], self.name, 0)
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"whole": "0" * 32}))


@pytest.mark.parametrize(
    ("kind", "says"), [(Idle, "it reports nothing"), (Forging, "it reports {'update'")]
)
def test_a_server_that_only_says_yes_is_found_out_before_it_publishes(kind, says):
    control = Direct(Server("good"), kind("bad"))
    sender = sender_of(control, small_weights())
    try:
        with pytest.raises(
            WeightExchangeFailed, match="server bad: worker 0 acknowledged"
        ) as found:
            send(sender, 1)
        assert says in str(found.value) and found.value.phase == "update"
        assert found.value.broken == ("bad",)
        assert {s.version for s in control.servers} == {"default"} and "finish" not in control.calls
    finally:
        sender.close()


@pytest.mark.parametrize("change", ["one too few", "one too many", "another shape", "another name"])
def test_a_stream_that_differs_from_its_announcement_is_never_finished(change, exchange):
    sender, control = exchange
    source, tensors = sender._source._source, small_weights()
    if change == "one too few":
        del tensors["norm"]
    if change == "one too many":
        tensors["more"] = torch.ones(3)
    if change == "another shape":
        tensors["half"] = tensors["half"].T
    if change == "another name":
        tensors = {("layer.9" if n == "layer.2" else n): t for n, t in tensors.items()}
    source.tensors = tensors
    with pytest.raises(ValueError, match="the weight source yields"):
        send(sender, 1)
    assert "finish" not in control.calls


def test_a_tensor_that_waits_for_its_layer_survives_the_next_buckets(exchange):
    sender, control = exchange
    held = {}

    def load(pairs):  # as vLLM: by reference, until the layer is whole
        held.update(pairs)

    for server in control.servers:
        server.load = load
    send(sender, 1)
    assert all(torch.equal(held[n], t) for n, t in small_weights().items())


def test_a_failed_update_leaves_no_receipt_and_the_stream_is_walked_to_its_end(exchange):
    sender, control = exchange
    seen = []

    class Counting(Source):
        def __iter__(self):
            for pair in self.tensors.items():
                seen.append(pair[0])
                yield pair

    sender._source._source = Counting(small_weights())
    control.servers[1].load = lambda pairs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        send(sender, 1)
    assert len(seen) < 7
    sender.abandon()
    sender.abandon()
    assert seen == list(small_weights())  # where the other ranks wait in their gathers
    assert not list(sender.root.glob("receipt-*")) and control.servers[1].ledger.broken
    sender.begin()
    sender.abandon()  # the next exchange failed before its first bucket
    assert seen == list(small_weights()) * 2


def test_close_removes_the_folder_which_nobody_else_can_read(exchange):
    sender, _ = exchange
    send(sender, 1)
    assert sender.root.is_dir() and sender.root.stat().st_mode & 0o077 == 0
    sender.close()
    assert not sender.root.exists()


def test_a_rank_without_control_only_joins_the_gathers():
    source = Source(small_weights())
    sender = SharedMemorySender(source, None, bucket_bytes=1024)  # pyright: ignore
    sender.connect()
    assert (send(sender, 5), source.passes, sender.root) == ("", 1, None)
    sender.abandon()
    assert source.passes == 1
    sender.close()


def test_shared_memory_without_room_is_named_before_a_server_is_touched(exchange, monkeypatch):
    sender, control = exchange

    def full(path, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_sip.rollout.shared_memory.Slot", full)
    with pytest.raises(WeightExchangeFailed, match=r"no room for 2 buckets.*rollout\.bucket_mib"):
        send(sender, 1)
    assert control.calls == ["init"]
