"""Twenty faults of a weight exchange with a real vLLM server, which is restarted after each."""

import copy
import random
import urllib.error

import pytest
from exchange_faults import FAULTS, ON_ONE_BUCKET, Call
from exchange_server import exchange, llama, policy_fleet, post, sender_to, weights_of
from test_exchange_server import engine_of, samples

from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.vllm_engine import BadReply
from megatron_sip.serving.client import RequestFailed

pytestmark = pytest.mark.full

TWENTY = [*enumerate(FAULTS), (len(FAULTS), "flipped_bit")]
assert len(TWENTY) == 20


class FaultyClient(ControlClient):
    """The real one, over a wire that does one thing wrong."""

    fault, where, root = "", 1, None

    def __init__(self, endpoints):
        super().__init__(endpoints, timeout_s=120.0)
        self.sent, self.last = [], []

    def arm(self, fault, where, seed):
        self.fault, self.where, self.rng = fault, where, random.Random(seed)
        self.last, self.sent = self.sent, []

    def update_weights(self, update_info):
        info, deliver = copy.deepcopy(update_info), super().update_weights
        self.sent.append((copy.deepcopy(info), (self.root / info["file"]).read_bytes()))
        index = info["bucket"]["index"]
        if self.fault == "idle" or (self.fault.startswith("half") and index > self.where):
            return
        fault = next((f for f in ON_ONE_BUCKET if f.__name__ == self.fault), None)
        if fault is None or index != self.where:
            deliver(info)
        else:
            fault(Call(info, self.root, deliver, self.last), self.rng)
        if self.fault == "half update, then a whole one" and index == self.where:
            self._state = "paused"  # it forgot what it began
            self.start_weight_update()

    def finish_weight_update(self, weight_version=None):
        if self.fault == "lost finish":
            self._state = "paused"
            return
        super().finish_weight_update(weight_version)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with policy_fleet(tmp_path_factory.mktemp("faults"), "policy") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def models():
    return [weights_of(llama(seed)) for seed in range(2)]


@pytest.mark.parametrize(("number", "fault"), TWENTY, ids=[f"{n}-{f}" for n, f in TWENTY])
def test_a_fault_is_found_before_a_token_is_used(number, fault, fleet, models, tmp_path):
    server = fleet.endpoints["policy"]
    control = FaultyClient([server])
    sender = sender_to(control, models[0])
    control.root = sender.root
    engine = engine_of(server, tmp_path)
    try:
        engine.weight_version = exchange(sender, control, models[0], 3)
        engine.generate(samples(), 1, seed=1, step=0)
        num_buckets = len(control.sent)
        control.arm(fault, number % (num_buckets - 1), seed=number)
        tensors = models[0] if fault == "no-op" else models[1]
        if fault == "lost finish":
            engine.weight_version = exchange(sender, control, tensors, 4)
        else:
            with pytest.raises(WeightExchangeFailed) as failure:
                exchange(sender, control, tensors, 4)
            assert failure.value.server == "policy" and failure.value.broken == ("policy",)
            with pytest.raises(WeightExchangeFailed, match="was not restarted"):
                control.replace([server])
            resume(server)
            engine.weight_version = f"4-{'0' * 32}"  # what a trainer that noticed nothing expects
            engine._timeout_s = 10.0
        with pytest.raises((BadReply, RequestFailed)):
            engine.generate(samples(), 1, seed=1, step=0)
    finally:
        sender.close()
        fleet.relaunch("policy")
        fleet.wait()


def resume(server):
    """As somebody else might; a server that lost its engine cannot."""
    try:
        post(server, "/resume")
    except (urllib.error.URLError, ConnectionError):
        return
