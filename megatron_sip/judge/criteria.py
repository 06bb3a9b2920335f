"""How a question becomes a request, and how a reply becomes a score. Pure.

A form is two functions: `build` makes the request to POST /v1/completions, `parse` reads its
reply. Both read the model's probabilities in prefill, so nothing that a candidate says can be
taken for a verdict. A reply that is odd in any way is `UnusableReply`, never a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sip import config
from megatron_sip.judge.prompts import Prompt
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.types import Question

TOP_LOGPROBS = 20  # vLLM's default limit


class UnusableReply(ValueError):
    """A reply from which no score can be read; the message says why."""


@dataclass(frozen=True)
class Subject:
    """What a question is about, as text."""

    prefix: str  # what the criterion may see of the prefix
    candidate: str
    opponent: str = ""


@dataclass(frozen=True)
class Request:
    """A request and what is needed to read its reply."""

    body: dict[str, Any]  # without model and seed
    scored: tuple[int, ...] = ()  # likelihood: places of the tokens in the prompt that count
    label_ids: tuple[int, ...] = ()  # label forms: the first label's probability is the score


@dataclass(frozen=True)
class Form:
    """One way of asking."""

    build: Callable[..., Request]  # (subject, question, criterion, tokenizer, prompt)
    parse: Callable[[Mapping[str, Any], Request], float]
    pairwise: bool = False


def build_likelihood(
    subject: Subject,
    *,
    question: Question,
    criterion: config.LikelihoodCriterion,
    tokenizer: JudgeTokenizer,
    prompt: Prompt | None,
) -> Request:
    """Prefix and candidate as one text; the prompt's log-probs are the answer.

    The very first token of a request has no log-prob and is left out.
    Raises: UnusableReply if there is nothing to score.
    """
    ids, places = tokenizer.encode_continuation(
        subject.prefix, continuation=subject.candidate, white_space=criterion.white_space
    )
    places = tuple(place for place in places if place > 0)
    if not places:
        raise UnusableReply("not asked: the continuation has no token to score")
    return Request({"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}, places)


def build_labels(
    subject: Subject,
    *,
    question: Question,
    criterion: config.AskedCriterion,
    tokenizer: JudgeTokenizer,
    prompt: Prompt | None,
) -> Request:
    """The prompt, answered by one token, with the probabilities of the likeliest tokens."""
    assert prompt is not None and len(prompt.labels) == 2
    first, second = subject.candidate, subject.opponent
    if not question.candidate_first:
        first, second = second, first
    fields = {"prefix": subject.prefix, "candidate": subject.candidate}
    fields |= {"option_1": first, "option_2": second}
    ids = tokenizer.render(
        prompt.messages,
        fields={name: fields[name] for name in prompt.placeholders},
        answer=prompt.answer,
    )
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": TOP_LOGPROBS}
    body["return_tokens_as_token_ids"] = True
    return Request(body, label_ids=tuple(tokenizer.label_id(label) for label in prompt.labels))


def parse_likelihood(reply: Mapping[str, Any], request: Request) -> float:
    """Mean log-prob of the scored tokens, nats a token.

    Raises: UnusableReply if the reply does not hold one log-prob <= 0 for each of them.
    """
    ids, rows = request.body["prompt"], _choice(reply).get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise UnusableReply("the reply's prompt_logprobs do not match the prompt's length")
    values = []
    for place in request.scored:
        row = rows[place]
        entry = row.get(str(ids[place])) if isinstance(row, dict) else None
        values.append(_logprob(entry.get("logprob") if isinstance(entry, dict) else None))
    return math.fsum(values) / len(values)


def parse_labels(reply: Mapping[str, Any], request: Request) -> float:
    """P(first label) / (P(first label) + P(second label)), in [0, 1].

    A label that is not among the returned tokens counts as improbable, 0.
    Raises: UnusableReply if neither is, or if the reply has another shape.
    """
    logprobs = _choice(reply).get("logprobs")
    rows = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        raise UnusableReply("the reply has no top_logprobs of one token")
    names = [f"token_id:{label}" for label in request.label_ids]
    found = [math.exp(_logprob(rows[0][n])) if n in rows[0] else 0.0 for n in names]
    if sum(found) <= 0:
        likeliest = max(rows[0], key=lambda n: rows[0][n], default="none")
        raise UnusableReply(f"no label is among the likeliest tokens (likeliest: {likeliest!r})")
    return found[0] / sum(found)


def _choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UnusableReply("the reply has not exactly one choice")
    return choices[0]


def _logprob(value: Any) -> float:
    """`value` as a log-probability in nats; vLLM writes -9999 for minus infinity."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not -9999 < value <= 0:
        raise UnusableReply(f"{value!r} is no log-probability")
    return float(value)


FORMS: dict[str, Form] = {
    "likelihood": Form(build_likelihood, parse_likelihood),
    "pairwise": Form(build_labels, parse_labels, pairwise=True),
    "pointwise": Form(build_labels, parse_labels),
}


def is_pairwise(criterion: config.AskedCriterion) -> bool:
    """Whether the criterion compares two candidates."""
    return FORMS[criterion.form].pairwise
