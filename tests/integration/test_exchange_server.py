"""Weight exchanges with a real vLLM server: its log-probs are those of the weights that were sent.

Buckets are smaller than a layer, so that vLLM holds tensors while their slot is written again; and
a warm prefix cache stands over every exchange. Who knows the truth is the Llama of Hugging Face.
"""

import json

import numpy as np
import pytest
from exchange_server import (
    cached_tokens,
    exchange,
    get,
    llama,
    logprobs_of,
    policy_fleet,
    post,
    sender_to,
    weights_of,
)

from megatron_sip.data.tokenizer_training import train_tokenizer
from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.vllm_engine import BadReply, VllmEngine
from megatron_sip.types import SipSample

pytestmark = pytest.mark.full  # starts vLLM

PREFIX = 160  # tokens: five blocks of the CPU's cache
TEXT = "We the people of the union, in order to form a more perfect union, do ordain.\n" * 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    with policy_fleet(folder, "policy") as fleet:
        yield fleet.endpoints["policy"]


@pytest.fixture(scope="module")
def engine(server, tmp_path_factory):
    return engine_of(server, tmp_path_factory.mktemp("tokenizer"))


def engine_of(server, folder):
    output = folder / "tokenizer.model"
    tokenizer = train_tokenizer(iter([TEXT]), vocab_size=290, output=output)
    return VllmEngine(
        [server], tokenizer, temperature=1.0, top_p=1.0, max_tokens=8, concurrency=4, timeout_s=60.0
    )


def samples():
    """Prefixes that share all but their last token."""
    shared = np.random.default_rng(0).integers(5, 280, PREFIX).astype(np.int32)
    ends = np.arange(20, 24, dtype=np.int32)
    return [SipSample(i, i, PREFIX + 1, np.append(shared, end), shared[:8])
            for i, end in enumerate(ends)]  # fmt: skip


def worst_gap(engine, model):
    """Largest |engine - truth| of the log-probs of rollouts, nats."""
    gaps = []
    for sample, rollouts in zip(samples(), engine.generate(samples(), 2, seed=1, step=0),
                                strict=True):  # fmt: skip
        for rollout in rollouts:
            tokens = [*sample.prefix_ids.tolist(), *rollout.token_ids.tolist()]
            truth = logprobs_of(model, tokens)[len(sample.prefix_ids) - 1 :].numpy()
            gaps.append(np.abs(truth - rollout.logprobs).max())
    return max(gaps)


def test_no_rollout_after_an_exchange_sees_what_the_cache_held_before(server, engine):
    control = ControlClient([server], timeout_s=120.0)
    models = [llama(seed) for seed in range(3)]
    sender = sender_to(control, weights_of(models[0]))
    try:
        for version, model in enumerate(models):
            engine.weight_version = exchange(sender, control, weights_of(model), version)
            for _ in range(2):  # the second time the prefix comes from the cache
                before = cached_tokens(server)
                assert worst_gap(engine, model) < 1e-4
            assert cached_tokens(server) - before >= 4 * (PREFIX - 32)
        others = worst_gap(engine, models[0])
        assert others > 0.1  # stale weights or keys and values could not hide
        failed_update(server, engine, control, sender, weights_of(models[0]))
    finally:
        sender.close()


def failed_update(server, engine, control, sender, tensors):
    """The last thing that this server is used for: it cannot be used after it."""
    published, deliver = engine.weight_version, control.update_weights

    def flip(info):
        if info["bucket"]["index"] == 3:
            path = sender.root / info["file"]
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        deliver(info)

    control.update_weights = flip
    with pytest.raises(WeightExchangeFailed, match="received bytes differ") as failure:
        exchange(sender, control, tensors, 7)
    assert (failure.value.server, failure.value.phase) == ("policy", "update")
    assert failure.value.broken == ("policy",)
    with pytest.raises(WeightExchangeFailed, match="resume is not allowed while failed"):
        control.resume()
    engine.weight_version = ""
    with pytest.raises(BadReply, match="no weights are published"):
        engine.generate(samples(), 1, seed=1, step=0)
    with pytest.raises(WeightExchangeFailed, match=f"it holds weights '{published}'; restart it"):
        control.replace([server])
    post(server, "/resume")  # as somebody else might
    other = ControlClient([server], timeout_s=60.0)
    with pytest.raises(WeightExchangeFailed, match="after one that failed"):
        exchange(sender_of_another_trainer := sender_to(other, tensors), other, tensors, 8)
    sender_of_another_trainer.close()
    version = json.loads(get(server, "/weight_info"))["weight_version"]
    assert version == published  # what it says of any token that it still makes
