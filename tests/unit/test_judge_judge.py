import math
import shutil

import numpy as np
import pytest
from judge_helpers import (
    DROP,
    HANG,
    labels_reply,
    likelihood_reply,
    make_model_folder,
    make_pool,
    scripted_server,
    served,
)

from megatron_sip import config_judge
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.servers import JudgeFailed
from megatron_sip.judge.text_model import JudgeTokenizer

LIKELIHOOD = config_judge.LikelihoodCriterion(
    form="likelihood", name="l", server="j", prefix_tokens=3
)
PAIRWISE = config_judge.PairwiseCriterion(
    form="pairwise", name="q", server="j", prompt="quality_pairwise_v1"
)
POINTWISE = config_judge.PointwiseCriterion(
    form="pointwise", name="s", server="j", prompt="safety_pointwise_v1"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def make_judge(url, folder, cache_dir, *criteria, limit=1.0, timeout_s=5.0, model="judge", **more):
    settings = config_judge.Judge(
        criteria=criteria,
        cache_dir=cache_dir,
        max_missing_rate=limit,
        timeout_s=timeout_s,
        **{"outage_patience_s": 0.0, "both_orders": 0.0} | more,
    )
    return Judge(
        criteria,
        servers={"j": served(url, folder, model=model)},
        cache=Cache(cache_dir),
        settings=settings,
        prefix_text=lambda sample, num: f"last {num} of {sample.sample_id}",
        suffix_text=lambda sample: f" suffix of {sample.sample_id}",
    )


class Server:
    """Answers each form by the texts in the request; `bad` replaces chosen replies."""

    def __init__(self, folder, bad=lambda text, n: None):
        self.tokenizer, self.bad, self.texts, self.seeds = JudgeTokenizer(folder), bad, [], []

    def __call__(self, path, body):
        text = self.tokenizer._trusted.decode(body["prompt"])
        self.texts.append(text)
        self.seeds.append(body["seed"])
        bad = self.bad(text, len(self.texts))
        if bad is not None:
            return bad
        if "prompt_logprobs" in body:
            return likelihood_reply(body, -float(text.count("o") + 1))
        if "Is this text safe" in text:
            yes, no = (self.tokenizer.label_id(x) for x in ("Yes", "No"))
            return labels_reply({yes: math.log(0.6), no: math.log(0.2)})
        first, second = (text.index(f"Continuation {i}:") for i in (1, 2))
        wins = text[first:second].count("good") + 1, text[second:].count("good") + 1
        one, two = (self.tokenizer.label_id(x) for x in "12")
        return labels_reply({one: math.log(wins[0] / 9), two: math.log(wins[1] / 9)})


def test_all_forms_reach_the_rewards(folder, tmp_path):
    server = Server(folder)
    with scripted_server(server) as url:
        judge = make_judge(url, folder, tmp_path, LIKELIHOOD, PAIRWISE, POINTWISE)
        texts = [" bad", " good", " good good"]
        pools = [make_pool(texts, prefix=f"P{i}", sample_id=i) for i in range(2)]
        rewards, verdicts, stats = judge.judge_pools(pools, seed=1)
    for reward, known in zip(rewards, verdicts, strict=True):
        quality = reward.by_criterion["q"]  # by hand: 1/(1+2), 1/(1+3), 2/(2+3)
        expected = [(1 / 3 + 1 / 4) / 2, (2 / 3 + 2 / 5) / 2, (3 / 4 + 3 / 5) / 2]
        np.testing.assert_allclose(quality, expected, rtol=1e-5)
        np.testing.assert_allclose(reward.by_criterion["s"], 0.75, rtol=1e-5)
        np.testing.assert_allclose(reward.by_criterion["l"], [-2, -4, -6])
        assert len(known) == 9 and reward.valid.all()
    assert (stats["verdicts"], stats["missing"], stats["cache_hits"]) == (18, 0, 3)
    assert any(t.startswith("last 3 of 1") for t in server.texts)
    assert stats["prompt_tokens"] > 0


def test_a_second_call_asks_nothing_even_without_a_server(folder, tmp_path):
    pools = [make_pool([" bad", " good"])]
    with scripted_server(Server(folder)) as url:
        first = make_judge(url, folder, tmp_path, PAIRWISE).judge_pools(pools, seed=1)
    second = make_judge("http://127.0.0.1:9", folder, tmp_path, PAIRWISE)
    _, verdicts, stats = second.judge_pools(pools, seed=1)
    assert verdicts == first[1]
    assert (stats["cache_hits"], stats["prompt_tokens"]) == (1, 0)


def test_equal_questions_of_one_call_are_paid_for_once(folder, tmp_path):
    server = Server(folder)
    with scripted_server(server) as url:
        judge = make_judge(url, folder, tmp_path, POINTWISE)
        _, _, stats = judge.judge_pools([make_pool([" same"] * 5)], seed=1)
    assert len(server.texts) == 1 and stats["cache_hits"] == 4


def test_a_cached_verdict_is_turned_when_the_candidates_change_places(folder, tmp_path):
    with scripted_server(Server(folder)) as url:
        judge = make_judge(url, folder, tmp_path, PAIRWISE)
        for seed in range(6):
            for texts in ([" bad", " good"], [" good", " bad"]):
                rewards, _, stats = judge.judge_pools([make_pool(texts)], seed=seed)
                best = np.argmax(rewards[0].total)
                assert texts[best] == " good"
    assert stats["cache_hits"] == 1


def nan(text, n):
    return (200, {}, '{"choices": [{"prompt_logprobs": [null, NaN]}]}') if "bad" in text else None


@pytest.mark.parametrize(
    "bad",
    [
        nan,
        lambda text, n: {"choices": []} if "bad" in text else None,
        lambda text, n: (400, {}, "too long") if "bad" in text else None,
        lambda text, n: HANG if "bad" in text else None,
        lambda text, n: DROP if "bad" in text else None,
        lambda text, n: (500, {}, "oops") if "bad" in text else None,
    ],
)
def test_a_failing_judge_gives_missing_verdicts_never_zero(folder, tmp_path, bad):
    with scripted_server(Server(folder, bad)) as url:
        judge = make_judge(url, folder, tmp_path, LIKELIHOOD, timeout_s=0.8)
        rewards, verdicts, stats = judge.judge_pools([make_pool([" bad", " good"])], seed=1)
    failed, fine = verdicts[0]
    assert failed.score is None and failed.reply
    assert fine.score == -4.0
    assert np.isnan(rewards[0].by_criterion["l"][0]) and np.isnan(rewards[0].total[0])
    assert list(rewards[0].valid) == [False, True]
    assert (stats["missing"], rewards[0].num_missing) == (1, 1)


def test_an_unusable_reply_is_asked_once_more_with_another_seed(folder, tmp_path):
    server = Server(folder, lambda text, n: {"choices": []} if n == 1 else None)
    with scripted_server(server) as url:
        judge = make_judge(url, folder, tmp_path, LIKELIHOOD)
        _, verdicts, stats = judge.judge_pools([make_pool([" good"])], seed=1)
    assert verdicts[0][0].score == -4.0
    assert len(set(server.seeds)) == 2 and stats["retries"] == 1


def test_a_missing_verdict_is_not_cached(folder, tmp_path):
    server = Server(folder, lambda text, n: {"choices": []} if n <= 2 else None)
    with scripted_server(server) as url:
        judge = make_judge(url, folder, tmp_path, LIKELIHOOD)
        scores = [judge.judge_pools([make_pool([" x"])], seed=1)[1][0][0].score for _ in range(2)]
    assert scores == [None, -2.0]


def test_too_many_missing_verdicts_stop_the_call_early(folder, tmp_path):
    server = Server(folder, lambda text, n: (400, {}, "no such thing"))
    with scripted_server(server) as url:
        judge = make_judge(url, folder, tmp_path, LIKELIHOOD, limit=0.1)
        pools = [make_pool([f" {i} {k}" for k in range(10)], sample_id=i) for i in range(20)]
        with pytest.raises(JudgeFailed, match=r"server j.*of 200.*10\.0%.*no such thing"):
            judge.judge_pools(pools, seed=1)
    assert len(server.texts) < 60


def test_an_empty_candidate_is_missing_but_not_the_judges_failure(folder, tmp_path):
    with scripted_server(Server(folder)) as url:
        judge = make_judge(url, folder, tmp_path, LIKELIHOOD, limit=0.01)
        rewards, _, stats = judge.judge_pools([make_pool(["", " x"])], seed=1)
    assert list(rewards[0].valid) == [False, True]
    assert (stats["missing"], stats["not_asked"]) == (1, 1)


def test_a_server_of_another_model_stops_the_call(folder, tmp_path):
    with scripted_server(Server(folder), model="other") as url:
        judge = make_judge(url, folder, tmp_path, LIKELIHOOD)
        with pytest.raises(ValueError, match="serves other but recipe names judge"):
            judge.judge_pools([make_pool([" x"])], seed=1)


def test_a_server_that_is_not_there_stops_the_call(folder, tmp_path):
    judge = make_judge("http://127.0.0.1:9", folder, tmp_path, LIKELIHOOD, timeout_s=0.5)
    with pytest.raises(JudgeFailed, match="server j"):
        judge.judge_pools([make_pool([" x"])], seed=1)


def test_a_prompt_that_does_not_fit_the_form_is_refused_at_the_start(folder, tmp_path):
    wrong = PAIRWISE.model_copy(update={"prompt": "safety_pointwise_v1"})
    with pytest.raises(ValueError, match="is not for pairwise"):
        make_judge("http://h:1", folder, tmp_path, wrong)


def test_a_prompt_without_a_chat_template_is_refused_at_the_start(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink()
    make_judge("http://h:1", bare, tmp_path / "a", LIKELIHOOD)
    with pytest.raises(ValueError, match="chat template"):
        make_judge("http://h:1", bare, tmp_path / "b", PAIRWISE)
