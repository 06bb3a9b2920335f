"""How a question becomes a request, and how a reply becomes a score. Pure.

A form is two functions: `build` makes the request, `parse` reads its reply. The forms of this file
read the model's probabilities in prefill, so nothing that a candidate says can be taken for a
verdict; `reasoned.py` reads what the model wrote. A reply that is odd in any way is
`UnusableReply`, never a score.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from megatron_sip import config_judge
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
    suffix: str = ""  # how the text really goes on


@dataclass(frozen=True)
class Request:
    """A request and what is needed to read its reply."""

    body: dict[str, Any]  # without model and seed
    scored: tuple[int, ...] = ()  # likelihood: places of the tokens in the prompt that count
    label_ids: tuple[int, ...] = ()  # of the possible verdicts, where probabilities are read
    labels: tuple[str, ...] = ()  # the possible verdicts
    values: tuple[float, ...] = ()  # the score of each
    route: str = "/v1/completions"
    output: int = 0  # classifier: which of the numbers it gives
    is_sampled: bool = True  # whether the route takes a seed


@dataclass(frozen=True)
class Form:
    """One way of asking."""

    build: Callable[..., Request]  # (subject, question, criterion, tokenizer, prompt)
    parse: Callable[[Mapping[str, Any], Request], float]


def build_likelihood(
    subject: Subject,
    *,
    question: Question,
    criterion: config_judge.LikelihoodCriterion,
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
    criterion: config_judge.AskedCriterion,
    tokenizer: JudgeTokenizer,
    prompt: Prompt | None,
) -> Request:
    """The prompt, answered by one token, with the probabilities of the likeliest tokens."""
    assert prompt is not None
    ids = tokenizer.render(
        prompt.messages, fields=fields_of(subject, question, prompt), answer=prompt.answer
    )
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": TOP_LOGPROBS}
    body["return_tokens_as_token_ids"] = True
    return Request(
        body,
        label_ids=tuple(tokenizer.label_id(label) for label in prompt.labels),
        labels=prompt.labels,
        values=prompt.values,
    )


def fields_of(subject: Subject, question: Question, prompt: Prompt) -> dict[str, str]:
    """Text of each placeholder of a prompt; all but `nonce` is untrusted."""
    first, second = subject.candidate, subject.opponent
    if not question.candidate_first:
        first, second = second, first
    fields = {"prefix": subject.prefix, "candidate": subject.candidate, "suffix": subject.suffix}
    fields |= {"option_1": first, "option_2": second}
    shown = {name: fields[name] for name in prompt.placeholders - {"nonce"}}
    if "nonce" in prompt.placeholders:
        of = shown.get("prefix") or "".join(sorted(shown.values()))
        shown["nonce"] = nonce(of, avoid=tuple(shown.values()))
    return shown


def nonce(text: str, *, avoid: Sequence[str]) -> str:
    """8 hex digits that mark where untrusted text begins and ends.

    It depends on `text`, which all questions on one prefix have in common, so that their prompts
    begin with the same tokens; nobody can write into a text the digest of what it is a part of.

    Args: avoid: it stands in none of these.
    """
    for again in count():
        digest = hashlib.blake2b(f"{again}\0{text}".encode(), digest_size=4).hexdigest()
        if not any(digest in other for other in avoid):
            return digest
    raise AssertionError


def parse_likelihood(reply: Mapping[str, Any], request: Request) -> float:
    """Mean log-prob of the scored tokens, nats a token.

    Raises: UnusableReply if the reply does not hold one log-prob <= 0 for each of them.
    """
    ids, rows = request.body["prompt"], only_choice(reply).get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise UnusableReply("the reply's prompt_logprobs do not match the prompt's length")
    values = []
    for place in request.scored:
        row = rows[place]
        entry = row.get(str(ids[place])) if isinstance(row, dict) else None
        values.append(_logprob(entry.get("logprob") if isinstance(entry, dict) else None))
    return math.fsum(values) / len(values)


def parse_labels(reply: Mapping[str, Any], request: Request) -> float:
    """sum of P(label) x value / sum of P(label), in [0, 1].

    A label that is not among the returned tokens counts as improbable, 0.
    Raises: UnusableReply if none is, or if the reply has another shape.
    """
    logprobs = only_choice(reply).get("logprobs")
    rows = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        raise UnusableReply("the reply has no top_logprobs of one token")
    names = [f"token_id:{label}" for label in request.label_ids]
    found = [math.exp(_logprob(rows[0][n])) if n in rows[0] else 0.0 for n in names]
    if sum(found) <= 0:
        likeliest = max(rows[0], key=lambda n: rows[0][n], default="none")
        raise UnusableReply(f"no label is among the likeliest tokens (likeliest: {likeliest!r})")
    return math.fsum(p * v for p, v in zip(found, request.values, strict=True)) / sum(found)


def build_classifier(
    subject: Subject,
    *,
    question: Question,
    criterion: config_judge.ClassifierCriterion,
    tokenizer: JudgeTokenizer,
    prompt: Prompt | None,
) -> Request:
    """Prefix and candidate as one text for a model that gives numbers.

    Raises: UnusableReply if there is no text.
    """
    prefix = subject.prefix if criterion.prefix_tokens else ""
    ids, _ = tokenizer.encode_continuation(prefix, continuation=subject.candidate)
    if not subject.candidate or not ids:
        raise UnusableReply("not asked: there is no continuation")
    return Request(
        {"input": ids, "use_activation": criterion.route == "classify"},  # else vLLM decides
        route=f"/{criterion.route}",
        output=criterion.output,
        is_sampled=False,
    )


def parse_classify(reply: Mapping[str, Any], request: Request) -> float:
    """Probability of class `output`. Raises: UnusableReply if the reply has another shape."""
    value = _output(reply, "probs", request)
    if not 0 <= value <= 1:
        raise UnusableReply(f"{value!r} is no probability")
    return value


def parse_pooling(reply: Mapping[str, Any], request: Request) -> float:
    """Number at place `output`. Raises: UnusableReply if the reply has another shape."""
    return _output(reply, "data", request)


def _output(reply: Mapping[str, Any], key: str, request: Request) -> float:
    entries = reply.get("data")
    entry = entries[0] if isinstance(entries, list) and len(entries) == 1 else None
    numbers = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(numbers, list) or len(numbers) <= request.output:
        raise UnusableReply(f"the reply has no {key} with a number at place {request.output}")
    value = numbers[request.output]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise UnusableReply(f"{value!r} is no number")
    return float(value)


def only_choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    """The reply's choice. Raises: UnusableReply if it has none or several."""
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


def is_pairwise(criterion: config_judge.AskedCriterion) -> bool:
    """Whether the criterion compares two candidates."""
    return criterion.form == "pairwise"
