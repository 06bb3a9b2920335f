"""Only what the published weights made, whole and finite, becomes a candidate."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
from judge_helpers import scripted_server

from megatron_sip.data.tokenizer_training import train_tokenizer
from megatron_sip.rollout.vllm_engine import (
    BadReply,
    VllmEngine,
    derived_seed,
    home_of,
    policy_version_of,
)
from megatron_sip.serving.client import Endpoint, RequestFailed
from megatron_sip.types import SipSample

VERSION = "4-0123abc"
TEXT = "We the people of the union, in order to form a more perfect union, do ordain.\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    output = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(iter([TEXT]), vocab_size=290, output=output)


def sample_of(tokenizer, sample_id=0):
    ids = np.array(tokenizer.encode("We the people of the union"), np.int32)
    return SipSample(sample_id, sample_id, 4, ids[:4], ids[4:])


def choice_of(index, ids, **changes):
    """One choice as vLLM's /inference/v1/generate gives it."""
    logprobs = [{"token_id": int(t), "logprob": -0.5 - i / 3} for i, t in enumerate(ids)]
    return {
        "index": index,
        "token_ids": [int(t) for t in ids],
        "logprobs": {"content": logprobs},
        "finish_reason": "length",
        "weight_versions": [{"version": VERSION, "start": 0, "end": len(ids)}],
    } | changes


def engine_of(urls, tokenizer, *, version=VERSION, vocab_size=None):
    """Clients of servers "roll", "roll1", ..."""
    engine = VllmEngine(
        [Endpoint(f"roll{i or ''}", url, "policy") for i, url in enumerate(urls)],
        tokenizer,
        temperature=1.0,
        top_p=1.0,
        max_tokens=6,
        concurrency=4,
        timeout_s=5.0,
        vocab_size=vocab_size,
    )
    engine.weight_version = version
    return engine


def generate(url, tokenizer, samples, k, *, seed=1, step=0):
    return engine_of([url], tokenizer).generate(samples, k, seed=seed, step=step)


def test_good_reply_becomes_candidates_in_the_order_of_their_seeds(tokenizer):
    texts = [" union", " people", " order", " more"]
    ids = [tokenizer.encode(text)[:6] for text in texts]
    reply = {"choices": [choice_of(i, ids[i]) for i in (2, 0, 3, 1)]}
    reply["choices"][0] |= {"finish_reason": "stop"}  # index 2
    with scripted_server(lambda path, body: reply) as url:
        ((*candidates,),) = generate(url, tokenizer, [sample_of(tokenizer)], 4)
    assert [c.token_ids.tolist() for c in candidates] == ids
    assert [c.text for c in candidates] == texts
    assert [c.finish_reason for c in candidates] == ["length", "length", "stop", "length"]
    for candidate in candidates:
        assert candidate.source == "rollout" and candidate.policy_version == 4
        assert candidate.token_ids.dtype == np.int32
        assert candidate.logprobs.dtype == np.float32
        expected = [np.float32(-0.5 - i / 3) for i in range(len(candidate.token_ids))]
        assert candidate.logprobs.tolist() == expected


def test_text_is_what_the_tokens_add_to_the_prefix(tokenizer):
    first, last = (tokenizer.encode("é")[-2:][i] for i in (0, 1))  # two byte pieces
    sample = sample_of(tokenizer)
    sample = SipSample(
        0, 0, 5, np.append(sample.prefix_ids, first).astype(np.int32), sample.suffix_ids
    )
    with scripted_server(lambda path, body: {"choices": [choice_of(0, [last])]}) as url:
        ((candidate,),) = generate(url, tokenizer, [sample], 1)
    assert candidate.text == "é"


def test_an_id_that_only_the_policy_knows_stays_in_the_ids_and_one_that_it_does_not_is_refused(
    tokenizer,
):
    ids = [*tokenizer.encode(" union"), tokenizer.vocab_size + 3]
    with scripted_server(lambda path, body: {"choices": [choice_of(0, ids)]}) as url:
        engine = engine_of([url], tokenizer, vocab_size=tokenizer.vocab_size + 4)
        (((candidate,),)) = engine.generate([sample_of(tokenizer)], 1, seed=1, step=0)
        for size in (tokenizer.vocab_size + 3, None):
            engine = engine_of([url], tokenizer, vocab_size=size)
            with pytest.raises(BadReply, match=r"^roll: malformed reply: .* must lie in"):
                engine.generate([sample_of(tokenizer)], 1, seed=1, step=0)
    assert (candidate.token_ids.tolist(), candidate.text) == (ids, " union\ufffd")


def test_every_sample_is_one_request_of_token_ids_with_its_own_seed(tokenizer):
    asked = []

    def answer(path, body):
        asked.append((path, body))
        return {"choices": [choice_of(i, [5]) for i in range(2)]}

    samples = [sample_of(tokenizer, i) for i in (11, 12, 13)]
    with scripted_server(answer) as url:
        found = generate(url, tokenizer, samples, 2, seed=9, step=3)
    assert [len(candidates) for candidates in found] == [2, 2, 2]
    assert {path for path, _ in asked} == {"/inference/v1/generate"}
    for _, body in asked:
        assert body["token_ids"] == samples[0].prefix_ids.tolist()
        assert body["cache_salt"] == VERSION
        sampling = body["sampling_params"]
        assert (sampling["n"], sampling["max_tokens"], sampling["logprobs"]) == (2, 6, 0)
        assert sampling["stop_token_ids"] == [tokenizer.eod]
    seeds = [body["sampling_params"]["seed"] for _, body in asked]
    assert sorted(seeds) == sorted(derived_seed(9, 3, i) for i in (11, 12, 13))


def test_a_derived_seed_is_a_function_of_seed_step_and_sample():
    assert derived_seed(1, 2, 3) == derived_seed(1, 2, 3)
    parts = [(s, t, i) for s in range(4) for t in range(4) for i in range(4)]
    seeds = {derived_seed(*p) for p in parts}
    assert len(seeds) == len(parts) and all(0 <= s < 2**31 for s in seeds)
    assert derived_seed(1, 0, 0) == 917752063  # a change would change every run


IDS = [5, 6, 7]
NAN = json.loads("NaN")


def entries(*logprobs, ids=IDS):
    pairs = zip(ids, logprobs, strict=True)
    return {"logprobs": {"content": [{"token_id": t, "logprob": p} for t, p in pairs]}}


def spans(*versions):
    return {
        "weight_versions": [
            {"version": v, "start": i, "end": i + 1} for i, v in enumerate(versions)
        ]
    }


BAD_CHOICES = {
    "another version": spans("3-0123abc"),
    "the same step of another run": spans("4-ffffff"),
    "two versions": spans(VERSION, "5-0123abc"),
    "never synchronised": spans("default"),
    "no version": {"weight_versions": None},
    "aborted": {"finish_reason": "abort"},
    "aborted before its first token": {"finish_reason": "abort", "token_ids": [], "logprobs": None},
    "no finish reason": {"finish_reason": None},
    "log-probs of other tokens": entries(-1.0, -1.0, -1.0, ids=[5, 7, 6]),
    "too few log-probs": entries(-1.0, -1.0, ids=IDS[:2]),
    "no log-probs": {"logprobs": None},
    "NaN": entries(-1.0, NAN, -1.0),
    "infinite": entries(-1.0, -1.0, -float("inf")),
    "a missing number": entries(-1.0, None, -1.0),
    "no tokens": choice_of(0, []),
    "too many tokens": choice_of(0, range(5, 12)),
    "no choice at all": {"index": 3},
}


@pytest.mark.parametrize("what", BAD_CHOICES)
def test_a_reply_is_refused_and_its_server_named_for(what, tokenizer):
    reply = {"choices": [choice_of(0, IDS), choice_of(1, IDS) | BAD_CHOICES[what]]}
    if what in ("no tokens", "too many tokens"):
        reply["choices"][1]["index"] = 1
    with scripted_server(lambda path, body: reply) as url, pytest.raises(BadReply, match="roll"):
        generate(url, tokenizer, [sample_of(tokenizer)], 2)


@pytest.mark.parametrize("indices", [(0,), (0, 0), (0, 1, 2), (1, 2), ()])
def test_a_wrong_number_of_choices_is_refused(indices, tokenizer):
    reply = {"choices": [choice_of(i, IDS) for i in indices]}
    with scripted_server(lambda path, body: reply) as url, pytest.raises(BadReply, match="roll"):
        generate(url, tokenizer, [sample_of(tokenizer)], 2)


def echo(asked):
    """A server whose rollouts are a function of the request alone, as seeds make them."""

    def answer(path, body):
        asked.append(body)
        ids = [5 + (body["sampling_params"]["seed"] + i) % 200 for i in range(3)]
        return {"choices": [choice_of(0, ids)]}

    return answer


@pytest.mark.parametrize("num_servers", [1, 2, 3])
def test_a_prefix_always_meets_the_same_server_and_who_answers_changes_nothing(
    num_servers, tokenizer
):
    samples = [sample_of(tokenizer, i) for i in (12, 3, 7, 8, 11, 10)]
    asked = [[] for _ in range(num_servers)]
    with ExitStack() as stack:
        urls = [stack.enter_context(scripted_server(echo(a))) for a in asked]
        engine = engine_of(urls, tokenizer)
        found = engine.generate(samples, 1, seed=9, step=3)
        again = engine.generate(samples[::-1], 1, seed=9, step=3)[::-1]
        assert engine.seconds.keys() == {e.name for e in engine.endpoints}
    tokens = [[c.token_ids.tolist() for c in of_sample] for of_sample in found]
    assert tokens == [[c.token_ids.tolist() for c in of_sample] for of_sample in again]
    with scripted_server(echo([])) as url:
        alone = generate(url, tokenizer, samples, 1, seed=9, step=3)
    assert tokens == [[c.token_ids.tolist() for c in of_sample] for of_sample in alone]
    for place, bodies in enumerate(asked):
        seeds = {body["sampling_params"]["seed"] for body in bodies}
        mine = [s.sample_id for s in samples if home_of(s.sample_id, num_servers) == place]
        assert seeds == {derived_seed(9, 3, i) for i in mine} and len(bodies) == 2 * len(mine)
        assert len(mine) == len(samples) // num_servers


def test_the_server_that_failed_is_named(tokenizer):
    samples = [sample_of(tokenizer, i) for i in range(4)]
    bad = {"choices": [choice_of(0, IDS, **spans("3-0123abc"))]}
    with (
        scripted_server(echo([])) as good_url,
        scripted_server(lambda path, body: bad) as bad_url,
    ):
        engine = engine_of([good_url, bad_url], tokenizer)
        with pytest.raises(BadReply, match="roll1: a rollout was made by") as caught:
            engine.generate(samples, 1, seed=1, step=0)
        assert caught.value.server == "roll1"
        engine._timeout_s = 0.5
        engine.endpoints = (*engine.endpoints[:1], Endpoint("gone", "http://127.0.0.1:9", "p"))
        with pytest.raises(RequestFailed) as lost:
            engine.generate(samples, 1, seed=1, step=0)
    assert lost.value.server == "gone"


def test_nothing_is_asked_for_while_no_weights_are_published(tokenizer):
    asked = []
    with scripted_server(echo(asked)) as url:
        engine = engine_of([url], tokenizer, version="")
        with pytest.raises(BadReply, match="no weights are published"):
            engine.generate([sample_of(tokenizer)], 1, seed=1, step=0)
    assert not asked


def test_the_probe_asks_every_server_and_refuses_other_weights(tokenizer):
    def server(offset, version):
        def answer(path, body):
            assert body["cache_salt"] == VERSION
            entries = [None] + [{str(t): {"logprob": -t - offset}} for t in body["token_ids"][1:]]
            return {"choices": [{**choice_of(0, [5]), **spans(version)}],
                    "prompt_logprobs": entries}  # fmt: skip

        return answer

    with ExitStack() as stack:
        urls = [stack.enter_context(scripted_server(server(i, VERSION))) for i in range(2)]
        found = engine_of(urls, tokenizer).prompt_logprobs([4, 5, 6])
        assert {n: v.tolist() for n, v in found.items()} == {"roll": [-5, -6], "roll1": [-6, -7]}
        urls[1] = stack.enter_context(scripted_server(server(1, "default")))
        with pytest.raises(BadReply, match="roll1: a rollout was made by weights"):
            engine_of(urls, tokenizer).prompt_logprobs([4, 5, 6])


@pytest.mark.parametrize("version", ["default", "", "4", "4-", "-abc", "x-abc"])
def test_a_version_that_no_exchange_published_is_refused(version):
    with pytest.raises(BadReply):
        policy_version_of(version)
    assert policy_version_of("17-0a") == 17
