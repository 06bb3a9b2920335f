"""10,000 faults of a weight exchange, by seeds: no token of wrong weights is ever used.

A token is used if the trainer holds the exchange for done and the server answers with the version
that the trainer published: both must not be true unless the server loaded, bit for bit, what was
sent. Sender, files and receivers are those of a run.
"""

import copy
import os
import random
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch
from exchange_faults import FAULTS, ON_ONE_BUCKET, Call
from exchange_helpers import Direct, Server, send, sender_of, small_weights

from megatron_sip.rollout import shared_memory
from megatron_sip.rollout.control import WeightExchangeFailed
from megatron_sip.rollout.ledger import UpdateLedger, UpdateRefused

NUM_FAULTS = 10_000
BUCKETS = 3


def where_of(fault, seed):
    """Number of the bucket that it strikes, and the chances of what it does."""
    rng = random.Random(seed)
    return rng.randrange(BUCKETS - (fault == "half update")), rng


class FaultyWire(Direct):
    """Delivers to one server; one fault of the update that begins next."""

    def __init__(self):
        super().__init__(Server("a"))
        self.last, self.sent = [], []  # announcements and files of an update
        self.fault, self.where, self.rng = "", 0, random.Random(0)

    def arm(self, fault, seed):
        """The next update has this fault; what was sent before is the past."""
        self.fault, (self.where, self.rng) = fault, where_of(fault, seed)
        self.last, self.sent = self.sent, []

    def update_weights(self, info):
        (server,) = self.servers
        info = copy.deepcopy(info)
        root = server.receiver.root
        self.sent.append((copy.deepcopy(info), (root / info["file"]).read_bytes()))
        index = info["bucket"]["index"]
        if self.fault == "idle" or (self.fault.startswith("half") and index > self.where):
            return
        fault = next((f for f in ON_ONE_BUCKET if f.__name__ == self.fault), None)
        if fault is None or index != self.where:
            server.update(info)
        else:
            fault(Call(info, root, server.update, self.last), self.rng)
        if self.fault == "half update, then a whole one" and index == self.where:
            server.start()

    def finish_weight_update(self, version):
        (server,) = self.servers
        if self.fault != "lost finish":
            server.finish(version)


class AtOnce(ThreadPoolExecutor):
    """Does what it is given at once: 10,000 times two threads would be most of the time."""

    def submit(self, work, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def rig(monkeypatch):
    """A server that holds version 3."""
    monkeypatch.setattr(shared_memory, "ThreadPoolExecutor", AtOnce)
    wire = FaultyWire()
    sender = sender_of(wire, small_weights())
    wire.arm("", 0)
    assert exchange(wire, sender, 3)[0] == wire.servers[0].version
    wire.arm("", 0)
    yield wire, sender
    sender.close()


def exchange(wire, sender, version):
    """Version that the trainer believes is served, or why there is none."""
    try:
        return send(sender, version), ""
    except (UpdateRefused, WeightExchangeFailed) as error:
        sender.abandon()
        return "", str(error)


def trial(wire, sender, fault, seed):
    """An update with the fault, of a server that holds version 3; what the trainer was told,
    whether a token is used, whether what was sent is loaded.
    """
    (server,) = wire.servers
    server.ledger = UpdateLedger()
    server.ledger.version, server.ledger.whole = 3, wire.last[-1][0]["bucket"]["whole"]
    server.ledger._seen.add(wire.last[0][0]["bucket"]["update"])
    server.version = f"3-{server.ledger.whole}"
    sender.connect()
    second = weights_of(seed)
    wire.sent, wire.fault, (wire.where, wire.rng) = [], fault, where_of(fault, seed)
    sender._source._source.tensors = small_weights() if fault == "no-op" else second
    published, reason = exchange(wire, sender, 4)
    used = published != "" and published == server.version
    whole = server.loaded.keys() == second.keys() and all(
        torch.equal(server.loaded[n], t) for n, t in second.items()
    )
    return reason, used, whole


SECOND = [small_weights(seed) for seed in range(1, 9)]


def weights_of(seed):
    return SECOND[seed % len(SECOND)]


def test_ten_thousand_faults_are_found_before_a_token_is_used(rig):
    wire, sender = rig
    found = Counter()
    for i in range(NUM_FAULTS):
        fault = FAULTS[i % len(FAULTS)]
        reason, used, _ = trial(wire, sender, fault, seed=i)
        assert not used, (fault, i)
        assert reason or fault == "lost finish", (fault, i)
        found[fault] += 1
    assert found.total() == NUM_FAULTS and found.keys() == set(FAULTS)


def test_without_a_fault_the_same_rig_publishes_what_was_sent(rig):
    wire, sender = rig
    for seed in range(50):
        assert trial(wire, sender, "", seed) == ("", True, True)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "lost finish"])
def test_after_a_fault_a_server_takes_nothing_until_it_is_restarted(fault, rig):
    wire, sender = rig
    (server,) = wire.servers
    trial(wire, sender, fault, seed=5)
    held = server.version
    wire.arm("", 6)
    sender._source._source.tensors = weights_of(6)
    published, reason = exchange(wire, sender, 5)
    assert published == "" and "restart the server" in reason and server.version == held
    server.ledger, server.version = UpdateLedger(), "default"  # as a new process
    sender.connect()
    published, _ = exchange(wire, sender, 5)
    assert published == server.version != held


def elsewhere(update, server, file, info):
    update(server, info | {"file": file})


def test_a_folder_of_another_process_is_not_reached(rig):
    wire, sender = rig
    (server,) = wire.servers
    sender.begin()
    for file in ("../slot_0.safetensors", "/etc/passwd", "a/b", "..", ".", ""):
        server.ledger = UpdateLedger()
        sender.connect()
        server.update = partial(elsewhere, Server.update, server, file)
        _, reason = exchange(wire, sender, 1)
        assert "without folders" in reason or "cannot be read" in reason
    assert os.listdir(sender.root)
