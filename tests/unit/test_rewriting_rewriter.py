from dataclasses import replace

import numpy as np
import pytest
from judge_helpers import make_model_folder, scripted_server, served

from megatron_sip import config_judge
from megatron_sip.judge.cache import Cache
from megatron_sip.metrics import METRICS
from megatron_sip.rewriting.rewriter import Rewriter, RewriterFailed
from megatron_sip.types import SipSample

SETTINGS = config_judge.Rewriter(server="j", prompt="rewrite_v1", max_tokens=20, timeout_s=1.0)


class Characters:
    """A policy tokenizer of one token a character."""

    encoded = ()

    def encode(self, text):
        self.encoded = (*self.encoded, text)
        return [ord(c) for c in text]

    def continuation_text(self, prefix_ids, ids):
        return "".join(map(chr, prefix_ids)), "".join(map(chr, ids))


def sample(prefix="Once upon", suffix=" a time.", sample_id=0):
    ids = [np.array([ord(c) for c in t], dtype=np.int32) for t in (prefix, suffix)]
    return SipSample(sample_id, sample_id, len(prefix), *ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def make_rewriter(url, folder, cache_dir, tokenizer=None, *, suffix_tokens=8, **settings):
    return Rewriter(
        SETTINGS.model_copy(update=settings),
        server=served(url, folder),
        cache=Cache(cache_dir),
        tokenizer=tokenizer or Characters(),
        suffix_tokens=suffix_tokens,
    )


def says(*texts):
    def answer(path, body):
        answer.bodies.append(body)
        text = texts[min(len(answer.bodies), len(texts)) - 1]
        return text if isinstance(text, tuple) else {"choices": [{"text": text}]}

    answer.bodies = []
    return answer


def test_a_rewrite_continues_the_prefix_and_is_cut_to_the_limit(folder, tmp_path):
    tokenizer = Characters()
    with scripted_server(says("\na dream of gold\n")) as url:
        rewriter = make_rewriter(url, folder, tmp_path, tokenizer)
        (candidate,), stats = rewriter.rewrite([sample()], seed=1)
    assert candidate.text == " a dream"
    assert candidate.token_ids.dtype == np.int32 and len(candidate.token_ids) == 8
    assert (candidate.source, candidate.policy_version) == ("rewrite", -1)
    assert (candidate.finish_reason, len(candidate.logprobs)) == ("length", 0)
    assert tokenizer.encoded == (" a dream of gold",)  # the prefix is never encoded
    assert stats["rewrites"] == 1 and stats["dropped"] == 0


def test_a_copy_keeps_the_suffix_tokens(folder, tmp_path):
    tokenizer = Characters()
    with scripted_server(says("a time.")) as url:
        rewriter = make_rewriter(url, folder, tmp_path, tokenizer)
        (candidate,), stats = rewriter.rewrite([sample()], seed=1)
    np.testing.assert_array_equal(candidate.token_ids, sample().suffix_ids)
    assert stats["copied"] == 1 and tokenizer.encoded == ()


@pytest.mark.parametrize(
    "text", ["", " \n", "I'm sorry, but I cannot help with that.", "ab", "<<<"]
)
def test_what_is_empty_refused_or_short_leaves_the_pool_and_is_counted(folder, tmp_path, text):
    with scripted_server(says(text)) as url:
        candidates, stats = make_rewriter(url, folder, tmp_path).rewrite([sample()], seed=1)
    assert candidates == [None]
    assert (stats["dropped"], stats["failed"], stats["rewrites"]) == (1, 0, 0)


def test_a_failed_request_is_counted_and_asked_again_the_next_time(folder, tmp_path):
    samples = [sample(), sample(suffix=" a while", sample_id=1)]
    answer = says((400, {}, "no"), "a dream.", "a while.")
    with scripted_server(answer) as url:
        rewriter = make_rewriter(url, folder, tmp_path, concurrency=1)
        first, stats = rewriter.rewrite(samples, seed=1)
        assert [c is None for c in first] == [True, False] and stats["failed"] == 1
        second, stats = rewriter.rewrite(samples, seed=2)
    assert all(second) and (stats["failed"], stats["cache_hits"]) == (0, 1)


def test_a_stored_rewrite_needs_no_server(folder, tmp_path):
    with scripted_server(says("a dream.")) as url:
        (first,), _ = make_rewriter(url, folder, tmp_path).rewrite([sample()], seed=1)
    again = make_rewriter("http://127.0.0.1:9", folder, tmp_path)
    (second,), stats = again.rewrite([sample(sample_id=5)], seed=9)
    assert second.text == first.text and stats["cache_hits"] == 1


def test_the_seed_is_of_the_run_and_the_sample(folder, tmp_path):
    answer = says("a dream.")
    with scripted_server(answer) as url:
        for i, (seed, sample_id) in enumerate([(1, 0), (1, 0), (2, 0), (1, 1)]):
            rewriter = make_rewriter(url, folder, tmp_path / str(i))
            rewriter.rewrite([sample(sample_id=sample_id)], seed=seed)
    seeds = [body["seed"] for body in answer.bodies]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3


def test_a_call_without_any_answer_fails_loudly(folder, tmp_path):
    with (
        scripted_server(says((400, {}, "no luck"))) as url,
        pytest.raises(RewriterFailed, match=r"all 2 requests failed.*no luck"),
    ):
        make_rewriter(url, folder, tmp_path).rewrite([sample(), sample(prefix="x")], seed=1)
    with pytest.raises(RewriterFailed, match="server j"):
        make_rewriter("http://127.0.0.1:9", folder, tmp_path).rewrite([sample()], seed=1)
    assert make_rewriter("http://127.0.0.1:9", folder, tmp_path).rewrite([], seed=1)[0] == []


def test_the_rewriter_sees_the_last_tokens_of_the_prefix_only(folder, tmp_path):
    answer = says("a dream.")
    with scripted_server(answer) as url:
        rewriter = make_rewriter(url, folder, tmp_path, prefix_tokens=4)
        rewriter.rewrite([sample(prefix="Secret upon")], seed=1)
    text = served(url, folder).tokenizer._trusted.decode(answer.bodies[0]["prompt"])
    assert "upon" in text and "Secret" not in text


def test_a_prompt_without_suffix_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"rewriter\.prompt is safety_pointwise_v1"):
        make_rewriter("http://h:1", folder, tmp_path, prompt="safety_pointwise_v1")


@pytest.mark.parametrize(
    ("reply", "unsafe", "reason"),
    [
        ("I'm sorry, but I cannot help with that.", None, "refusal"),
        (" ", None, "empty"),
        ("a d\u200bream", None, "not_text"),
        ("ab", None, "too_short"),
        ("a time ago", True, "unchanged_unsafe"),
        ("a Once upon", None, "echoes_prefix"),
    ],
)
def test_every_reason_is_counted_by_its_name_and_is_a_metric(
    folder, tmp_path, reply, unsafe, reason
):
    with scripted_server(says(reply, "a dream.")) as url:
        rewriter = make_rewriter(url, folder, tmp_path, concurrency=1, suffix_tokens=11)
        samples = [sample(suffix=" a time ago"), sample("Not", " a time.")]
        found, stats = rewriter.rewrite(samples, seed=1, unsafe=[unsafe, None])
    assert found[0] is None and found[1] is not None
    counts = {name: n for name, n in stats.items() if name.startswith("dropped_") and n}
    assert counts == {f"dropped_{reason}": 1}
    assert (stats["dropped"], stats["failed"], stats["rewrites"]) == (1, 0, 1)
    assert all(f"rewrite/{name}" in METRICS for name in stats if name != "seconds")


def test_the_second_prompt_shows_last_words_and_length_and_ends_at_its_mark(folder, tmp_path):
    answer = says("long before all Once  upon\na dream.\n>>>\nThat is all.", "a dream.")
    with scripted_server(answer) as url:
        rewriter = make_rewriter(url, folder, tmp_path, prompt="rewrite_v2")
        prefix = "It was long before all Once upon"
        (candidate,), _ = rewriter.rewrite([sample(prefix)], seed=1)
        rewriter = make_rewriter(url, folder, tmp_path, prompt="rewrite_v1")
        rewriter.rewrite([sample(prefix)], seed=1)
    assert candidate.text == " a dream"
    text = served(url, folder).tokenizer._trusted.decode(answer.bodies[0]["prompt"])
    assert text.count("long before all Once upon a time.\n") == 1
    assert "about 2 words" in text and text.endswith("<<<")
    assert text.index("last words are: long before all Once upon") > text.index("a time.")
    assert [body["stop"] for body in answer.bodies] == [[">>>"], [">>>"]]


def test_what_max_tokens_cut_ended_by_length(folder, tmp_path):
    cut = {"choices": [{"text": "a drea", "finish_reason": "length"}]}
    with scripted_server(lambda *_: cut) as url:
        rewriter = make_rewriter(url, folder, tmp_path)
        for _ in range(2):  # the second time from the cache
            (candidate,), _ = rewriter.rewrite([sample()], seed=1)
            assert (candidate.text, candidate.finish_reason) == (" a drea", "length")


def test_equal_samples_of_one_call_are_paid_for_once(folder, tmp_path):
    answer = says("a dream.")
    with scripted_server(answer) as url:
        found, stats = make_rewriter(url, folder, tmp_path).rewrite([sample()] * 3, seed=1)
    assert len(answer.bodies) == 1 and all(found) and stats["rewrites"] == 3


def test_a_reply_that_an_older_version_stored_is_read(folder, tmp_path):
    rewriter = make_rewriter("http://127.0.0.1:9", folder, tmp_path)
    rewriter._cache.put(rewriter._key(rewriter._body(sample())), "a dream.")
    (candidate,), stats = rewriter.rewrite([sample()], seed=1)
    assert candidate.text == " a dream" and stats["cache_hits"] == 1


def test_a_server_without_tokenizer_is_refused(folder, tmp_path):
    server = replace(served("http://h:1", folder), tokenizer=None)
    with pytest.raises(ValueError, match=r"give servers\.j\.tokenizer"):
        Rewriter(
            SETTINGS, server=server, cache=Cache(tmp_path), tokenizer=Characters(), suffix_tokens=8
        )
