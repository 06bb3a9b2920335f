"""Verdicts that a model reasons about: a chat request, a JSON reply whose form the server enforces.

Any OpenAI-compatible endpoint can be asked. Text goes as text, so what spells a special token is
broken up first; and the reply is read as JSON with one of the prompt's labels, or not at all. What
remains of the risk is that a candidate talks the model into a verdict; `docs/judges.md` has its
measured rate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from megatron_sip.config_judge import PromptedCriterion, Reasoned
from megatron_sip.judge.criteria import Request, Subject, UnusableReply, fields_of, only_choice
from megatron_sip.judge.prompts import Prompt
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.types import Question

# How chat models write the borders of turns, thoughts, tools and images.
_MARKS = re.compile(
    r"""<\|[^|<>\n]{1,40}\|> | <\uff5c[^<>\n]{1,40}\uff5c> | <\|\w{1,40}> | <\w{1,40}\|>
    | </?s> | <</?SYS>> | </?[a-z]+(?:_[a-z0-9]+)+>
    | </?(?:bos|eos|eot|sop|eop|unk|pad|mask|think|thinking|channel|image|tools|unused\d+)>
    | \[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_[A-Z]+|THINK|IMG\w*|gMASK|CLS|SEP)\]""",
    re.IGNORECASE | re.VERBOSE,
)


def build_reasoned(
    subject: Subject,
    *,
    question: Question,
    criterion: PromptedCriterion,
    tokenizer: JudgeTokenizer | None,
    prompt: Prompt | None,
) -> Request:
    """The prompt as chat messages, to be answered by {"reasoning": ..., "verdict": a label}."""
    assert prompt is not None and isinstance(criterion.answer, Reasoned)
    special = tokenizer.special_texts if tokenizer else ()
    fields = {k: defused(v, special) for k, v in fields_of(subject, question, prompt).items()}
    body = {
        "messages": [
            {"role": role, "content": Template(text).substitute(fields)}
            for role, text in prompt.messages
        ],
        "max_tokens": criterion.answer.max_tokens,
        "temperature": criterion.answer.temperature,
        "top_p": criterion.answer.top_p,
        "response_format": _format(prompt.labels),
    }
    return Request(body, labels=prompt.labels, values=prompt.values, route="/v1/chat/completions")


def parse_reasoned(reply: Mapping[str, Any], request: Request) -> float:
    """Value of the verdict's label, in [0, 1].

    Raises: UnusableReply if the reply is cut, refused, or is not exactly the JSON that was asked.
    """
    choice = only_choice(reply)
    if choice.get("finish_reason") == "length":
        raise UnusableReply("the reply was cut; raise max_tokens of the criterion's answer")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    try:
        found = json.loads(text, object_pairs_hook=_once) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or set(found) != {"reasoning", "verdict"}:
        raise UnusableReply(f"the reply is not the JSON that was asked for: {str(text)[:80]!r}")
    verdict = found["verdict"]
    if not isinstance(found["reasoning"], str):
        raise UnusableReply(f"the reasoning is no text: {str(text)[:80]!r}")
    if not isinstance(verdict, str) or verdict not in request.labels:
        raise UnusableReply(f"verdict {verdict!r} is none of {', '.join(request.labels)}")
    return request.values[request.labels.index(verdict)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises: ValueError if it names a key twice: one of them may be quoted."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def defused(text: str, special: Sequence[str]) -> str:
    """The text with a space in whatever a chat template could take for a border of its own.

    Marks overlap and stand inside one another, so each is looked for until none is left.
    """
    for mark in sorted(special, key=len, reverse=True):
        letters = re.search(r"\S(?=\S)", mark)  # a space between these makes no new mark
        while letters and mark in text:
            text = text.replace(mark, f"{mark[: letters.end()]} {mark[letters.end() :]}")
    while _MARKS.search(text):
        text = _MARKS.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def _format(labels: Sequence[str]) -> dict[str, Any]:
    """`response_format`: reasoning first, then one of the labels."""
    schema = {
        "type": "object",
        "properties": {
            "reasoning": {"type": "string"},
            "verdict": {"type": "string", "enum": list(labels)},
        },
        "required": ["reasoning", "verdict"],
        "additionalProperties": False,
    }
    json_schema = {"name": "verdict", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": json_schema}
