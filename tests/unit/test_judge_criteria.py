import json
import math

import pytest
from judge_helpers import labels_reply, likelihood_reply, make_model_folder

from megatron_sip import config_judge
from megatron_sip.judge.criteria import (
    Request,
    Subject,
    UnusableReply,
    build_labels,
    build_likelihood,
    parse_classify,
    parse_labels,
    parse_likelihood,
    parse_pooling,
)
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.reasoned import parse_reasoned
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.types import Question

QUESTION = Question("c", 0, 1, 0, True)
PAIRWISE = config_judge.PairwiseCriterion(
    form="pairwise", name="c", server="j", prompt="quality_pairwise_v1"
)
SWAPPED = Question("c", 0, 1, 0, False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return JudgeTokenizer(make_model_folder(tmp_path_factory.mktemp("model")))


def likelihood(tokenizer, prefix="the world", text=" of words", **settings):
    criterion = config_judge.LikelihoodCriterion(
        form="likelihood", name="l", server="j", **settings
    )
    return build_likelihood(
        Subject(prefix, text),
        question=QUESTION,
        criterion=criterion,
        tokenizer=tokenizer,
        prompt=None,
    )


def pairwise(tokenizer, question=QUESTION):
    return build_labels(
        Subject("P", "AAA", "BBB"),
        question=question,
        criterion=PAIRWISE,
        tokenizer=tokenizer,
        prompt=load_prompt("quality_pairwise_v1"),
    )


def test_likelihood_is_the_mean_over_the_continuation_only(tokenizer):
    request = likelihood(tokenizer)
    reply = likelihood_reply(request.body)
    values = [-float(i) for i in range(1, len(request.scored) + 1)]
    rows = reply["choices"][0]["prompt_logprobs"]
    for row, token, value in zip(
        rows[-len(values) :], request.body["prompt"][-len(values) :], values, strict=True
    ):
        row[str(token)]["logprob"] = value
    assert parse_likelihood(reply, request) == pytest.approx(sum(values) / len(values))


def test_white_space_can_be_left_out_of_the_mean(tokenizer):
    text = ".\n\nthe world"
    every, some = (
        likelihood(tokenizer, text=text),
        likelihood(tokenizer, text=text, white_space=False),
    )
    assert every.body == some.body and len(some.scored) < len(every.scored)
    reply = likelihood_reply(every.body, -0.5)
    rows, ids = reply["choices"][0]["prompt_logprobs"], every.body["prompt"]
    for place in some.scored:
        rows[place][str(ids[place])]["logprob"] = -2.0
    assert parse_likelihood(reply, some) == -2.0
    share = len(some.scored) / len(every.scored)
    assert parse_likelihood(reply, every) == pytest.approx(-2.0 * share - 0.5 * (1 - share))
    with pytest.raises(UnusableReply, match="no token"):
        likelihood(tokenizer, text="\n\n \n", white_space=False)


def test_an_empty_continuation_is_not_asked(tokenizer):
    with pytest.raises(UnusableReply, match="no token"):
        likelihood(tokenizer, text="")


def test_the_first_token_of_a_request_is_not_scored(tokenizer):
    request = likelihood(tokenizer, prefix="", text="the world of words")
    assert request.scored == tuple(range(1, len(request.body["prompt"])))
    with pytest.raises(UnusableReply):
        likelihood(tokenizer, prefix="", text="x")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5, None, "-1", True, -9999.0])
def test_an_odd_log_prob_is_no_score(tokenizer, value):
    request = likelihood(tokenizer)
    reply = json.loads(json.dumps(likelihood_reply(request.body, value)))
    with pytest.raises(UnusableReply):
        parse_likelihood(reply, request)
    request = pairwise(tokenizer)
    with pytest.raises(UnusableReply):
        parse_labels(labels_reply({request.label_ids[0]: value}), request)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"choices": []},
        {"choices": [1]},
        {"choices": [{}, {}]},
        {"choices": [{"prompt_logprobs": None, "logprobs": None}]},
        {"choices": [{"prompt_logprobs": [None], "logprobs": {"top_logprobs": []}}]},
        {"choices": [{"prompt_logprobs": {}, "logprobs": {"top_logprobs": [None]}}]},
        {"choices": [{"prompt_logprobs": "x", "logprobs": {"top_logprobs": [{}]}}]},
    ],
)
@pytest.mark.parametrize("form", ["likelihood", "labels", "classify", "pooling", "reasoned"])
def test_a_reply_of_another_shape_is_no_score(tokenizer, reply, form):
    request, parse = {
        "likelihood": (likelihood(tokenizer), parse_likelihood),
        "labels": (pairwise(tokenizer), parse_labels),
        "classify": (Request({}), parse_classify),
        "pooling": (Request({}), parse_pooling),
        "reasoned": (Request({}, labels=("1", "2"), values=(1.0, 0.0)), parse_reasoned),
    }[form]
    with pytest.raises(UnusableReply):
        parse(reply, request)


def test_a_reply_about_other_tokens_is_no_score(tokenizer):
    request = likelihood(tokenizer)
    other = {"prompt": [t + 1 for t in request.body["prompt"]]}
    with pytest.raises(UnusableReply):
        parse_likelihood(likelihood_reply(other), request)


def test_labels_give_the_first_labels_share(tokenizer):
    request = pairwise(tokenizer)
    one, two = request.label_ids
    reply = labels_reply({one: math.log(0.3), two: math.log(0.1), 7: math.log(0.5)})
    assert parse_labels(reply, request) == pytest.approx(0.75)
    assert parse_labels(labels_reply({two: -1.0}), request) == 0.0
    with pytest.raises(UnusableReply, match="no label"):
        parse_labels(labels_reply({7: -0.1}), request)


def test_the_order_of_presentation_is_the_questions(tokenizer):
    texts = [
        tokenizer._trusted.decode(pairwise(tokenizer, q).body["prompt"])
        for q in (QUESTION, SWAPPED)
    ]
    assert [t.index("AAA") < t.index("BBB") for t in texts] == [True, False]
