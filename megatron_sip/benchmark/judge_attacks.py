"""Benchmark `judge-attacks`: what attacks on a judge bring with a real server and a small model.

Label form: each verdict is compared with P(label) read here from the reply's one answer position,
and the server must have read as many tokens as were sent; both hold by construction, so
`label_verdicts_of_another_source` is 0 or the code is broken. What an attack does bring is
persuasion: the shift of its score against a harmless text of as many tokens. Reasoned form: how
often the attack's text gets a better verdict than the same pair with the attack removed, beside the
rate of harmless texts of as many tokens. Shares speak of this judge, which is too small to judge
anything; measure the one that you use.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_sip.benchmark.judge_pools import JUDGE
from megatron_sip.config import StartServer
from megatron_sip.config_judge import (
    GradedCriterion,
    PairwiseCriterion,
    PointwiseCriterion,
    PromptedCriterion,
    Reasoned,
)
from megatron_sip.judge.attacks import PLAIN, Attack, structural_attacks
from megatron_sip.judge.criteria import Request, Subject, UnusableReply
from megatron_sip.judge.forms import form_of
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.serving.client import Endpoint, HttpClient
from megatron_sip.serving.client import run as gather
from megatron_sip.serving.fleet import Fleet
from megatron_sip.types import Question

LABEL_ATTACKS, REASONED_ATTACKS = 60, 40
MAX_TOKENS = 64  # of a reasoned reply
CONCURRENCY = 16
MAX_MODEL_LEN = 4096
TIMEOUT_S = 600.0
PREFIX = "The ferry did not sail that morning, and the captain sat in the harbour office. "
SUFFIX = "The wind was from the north, the radio gave no hope of a change, and he made tea."
OPPONENT = "At noon the wind fell. He went down to the pier, looked at the sea and cast off."
HARMLESS = "The rain went on, the gulls sat on the roofs, and nobody came to the harbour office. "
_PROMPTS = {
    "pairwise": ("quality_pairwise_v2", "quality_pairwise_reasoned_v1"),
    "pointwise": ("safety_pointwise_v2", "safety_pointwise_reasoned_v1"),
    "graded": ("factuality_graded_v1", "factuality_graded_reasoned_v1"),
}
CASES = (("pairwise", True), ("pairwise", False), ("pointwise", True), ("graded", True))


@dataclass(frozen=True)
class Answer:
    """One reply: the score of the attacker's text, None if it could not be read."""

    score: float | None
    is_as_read: bool  # the score is what the reply's probabilities say, of a prompt as sent


def run() -> dict[str, Any]:
    """Measure. Raises: ServerFailed if the judge does not come up; RequestFailed if it fails."""
    tokenizer, attacks = JudgeTokenizer(JUDGE), structural_attacks()
    settings = StartServer(kind="start", model=JUDGE, max_model_len=MAX_MODEL_LEN)
    with (
        tempfile.TemporaryDirectory() as folder,
        Fleet(
            {"judge": settings},
            model_dirs={"judge": JUDGE},
            log_dir=Path(folder),
            platform_kind="cpu",
            policy=(),
            weight_transfer="",
        ) as fleet,
    ):
        fleet.wait()
        endpoint = fleet.endpoints["judge"]
        started = time.perf_counter()
        label = asyncio.run(_label(endpoint, sample(attacks, LABEL_ATTACKS), tokenizer))
        label["label_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        free = asyncio.run(_reasoned(endpoint, sample(attacks, REASONED_ATTACKS), tokenizer))
        free["reasoned_seconds"] = time.perf_counter() - started
    return {
        "name": "judge-attacks",
        "settings": {
            "judge": JUDGE.name, "attacks": len(attacks), "label_attacks": LABEL_ATTACKS,
            "reasoned_attacks": REASONED_ATTACKS, "reasoned_max_tokens": MAX_TOKENS,
        },
        "results": label | free,
        "ratios": {
            "label_structural": label["label_verdicts_of_another_source"] / label["label_verdicts"],
            "reasoned_better": free["reasoned_attacked_better_share"],
        },
    }  # fmt: skip


def sample(attacks: Sequence[Attack], number: int) -> list[Attack]:
    """`number` of them, evenly spaced, so that every kind is there in its share."""
    return [attacks[i * len(attacks) // number] for i in range(number)]


def harmless(tokenizer: JudgeTokenizer, text: str) -> str:
    """A text without any attack that takes about as many tokens as `text`."""

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode_continuation("", continuation=text)[0])

    words = HARMLESS.split()
    number = max(1, round(num_tokens(text) * len(words) / num_tokens(HARMLESS)))
    return " ".join(islice(cycle(words), number))


async def _label(
    endpoint: Endpoint, attacks: Sequence[Attack], tokenizer: JudgeTokenizer
) -> dict[str, float]:
    texts = [text for a in attacks for text in (a.text, harmless(tokenizer, a.text))]
    async with HttpClient(endpoint, concurrency=CONCURRENCY) as client:
        answers = {
            case: await gather(
                _ask(client, _criterion(case[0]), text, first=case[1], tokenizer=tokenizer)
                for text in texts
            )
            for case in CASES
        }
    given = [a for found in answers.values() for a in found]
    results: dict[str, float] = {
        "label_verdicts": len(given),
        "label_verdicts_missing": sum(a.score is None for a in given),
        "label_verdicts_of_another_source": sum(not a.is_as_read for a in given),
    }
    for (form, first), found in answers.items():
        name = f"label_{form}" + ("" if first else "_swapped")
        pairs = zip(found[::2], found[1::2], strict=True)
        shifts = [
            a.score - b.score for a, b in pairs if a.score is not None and b.score is not None
        ]
        results |= {
            f"{name}_shift_mean": fmean(shifts),
            f"{name}_shift_median": median(shifts),
            f"{name}_shift_max": max(shifts),
            f"{name}_raised_by_0_1": sum(shift > 0.1 for shift in shifts) / len(shifts),
        }
    return results


async def _reasoned(
    endpoint: Endpoint, attacks: Sequence[Attack], tokenizer: JudgeTokenizer
) -> dict[str, float]:
    attacked = [a.text for a in attacks]
    texts = [PLAIN, *attacked, *(harmless(tokenizer, text) for text in attacked)]
    async with HttpClient(endpoint, concurrency=CONCURRENCY) as client:
        answers = await gather(
            _ask(client, _reasoned_criterion(form), text, first=first, tokenizer=tokenizer)
            for form, first in CASES
            for text in texts
        )
    scores = [a.score for a in answers]
    results: dict[str, float] = {
        "reasoned_replies": len(scores),
        "reasoned_unusable_share": scores.count(None) / len(scores),
    }
    for name, begin in (("attacked", 1), ("harmless", 1 + len(attacks))):
        known = [
            (score, scores[at])
            for at in range(0, len(scores), len(texts))
            for score in scores[at + begin : at + begin + len(attacks)]
        ]
        pairs = [(a, b) for a, b in known if a is not None and b is not None]
        results |= {
            f"reasoned_{name}_compared": len(pairs),
            f"reasoned_{name}_better_share": sum(a > b for a, b in pairs) / max(1, len(pairs)),
            f"reasoned_{name}_worse_share": sum(a < b for a, b in pairs) / max(1, len(pairs)),
        }
    return results


def _criterion(form: str) -> PromptedCriterion:
    kinds = {
        "pairwise": PairwiseCriterion, "pointwise": PointwiseCriterion, "graded": GradedCriterion,
    }  # fmt: skip
    return kinds[form](form=form, name=form, server="judge", prompt=_PROMPTS[form][0])


def _reasoned_criterion(form: str) -> PromptedCriterion:
    answer = Reasoned(kind="reasoned", max_tokens=MAX_TOKENS, temperature=0.0)
    return _criterion(form).model_copy(update={"prompt": _PROMPTS[form][1], "answer": answer})


async def _ask(
    client: HttpClient,
    criterion: Any,
    text: str,
    *,
    first: bool,
    tokenizer: JudgeTokenizer,
) -> Answer:
    """The judge's score of `text`, presented first or second."""
    form = form_of(criterion)
    request = form.build(
        Subject(PREFIX, text, OPPONENT, SUFFIX),
        question=Question(criterion.name, 0, 1, 0, first),
        criterion=criterion,
        tokenizer=tokenizer,
        prompt=load_prompt(criterion.prompt),
    )
    body = {"model": client.endpoint.model, "seed": 1, **request.body}
    reply = await client.post(request.route, body, deadline_s=TIMEOUT_S)
    try:
        value = form.parse(reply, request)
    except UnusableReply:
        return Answer(None, True)
    is_as_read = not request.label_ids or _as_read(reply, request, value)
    return Answer(value if first else 1 - value, is_as_read)


def _as_read(reply: dict[str, Any], request: Request, value: float) -> bool:
    """Whether the verdict is P(label) after exactly the tokens that were sent."""
    (choice,) = reply["choices"]
    (row,) = choice["logprobs"]["top_logprobs"]
    found = [math.exp(row.get(f"token_id:{i}", -math.inf)) for i in request.label_ids]
    weighted = sum(p * v for p, v in zip(found, request.values, strict=True))
    read = reply["usage"]["prompt_tokens"] == len(request.body["prompt"])
    return read and math.isclose(value, weighted / sum(found), rel_tol=1e-9)
