"""Pairs that people have judged: read from JSON lines, put to a judge, counted.

    {"prefix": "...", "a": " one continuation", "b": " another", "better": "a"}

`better` is "a", "b" or "tie"; `suffix`, how the text really goes on, is needed by criteria whose
prompt shows it; other keys are not read. A pair labelled "tie" has no right answer: it counts for
the consistency of orders and not for accuracy. A judge that calls two equal is half right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_sip.config_judge import Criterion
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.evaluation.statistics import bootstrap_interval
from megatron_sip.judge.agreement import mean_or_none, standing
from megatron_sip.types import Candidate, CandidatePool, PoolRewards, SipSample, Verdict

BETTER = ("a", "b", "tie")
CHANCE = 0.5
_TEXTS = ("prefix", "a", "b")
_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class LabelledPair:
    """Two continuations of a text and which of them a person prefers."""

    prefix: str
    a: str
    b: str
    better: Literal["a", "b", "tie"]
    suffix: str | None = None  # how the text really goes on; None: not given
    line: int = 0  # of the file, from 1


@dataclass(frozen=True)
class Accuracy:
    """How often one criterion, or the total, prefers what people prefer; None: unknown."""

    name: str
    accuracy: float | None
    low: float | None  # 95 % interval over prefixes
    high: float | None
    pairs: int  # that people decided and the judge answered
    missing: int  # without an answer
    better_first: float | None  # accuracy where the better one was shown first; pairwise only
    better_second: float | None
    consistent: float | None  # share of the pairs with the same answer in both orders
    consistent_low: float | None
    consistent_high: float | None


def read_pairs(path: Path) -> tuple[LabelledPair, ...]:
    """All pairs of a file, in its order; empty lines are passed over.

    Raises: ValueError naming file and line if a line is no pair, or if there is none.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a .jsonl file") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                pairs.append(_pair(line, number))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not pairs:
        raise ValueError(f"{path} holds no pair; write one JSON object a line")
    return tuple(pairs)


def _pair(line: bytes, number: int) -> LabelledPair:
    """Raises: ValueError saying what the line lacks."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object ({error})") from None
    if not isinstance(found, dict):
        raise ValueError('not a JSON object; write {"prefix": ..., "a": ..., "b": ..., ...}')
    texts: dict[str, str] = {}
    for key in (*_TEXTS, *(["suffix"] if found.get("suffix") is not None else [])):
        value = found.get(key)
        if not isinstance(value, str):
            raise ValueError(f'"{key}" is {_shown(value)}; it must be a text')
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f'"{key}" holds half of a surrogate pair; write it whole') from None
        texts[key] = value
    if texts["a"] == texts["b"]:
        raise ValueError('"a" and "b" are the same text; leave the line out')
    if found.get("better") not in BETTER:
        raise ValueError(f'"better" is {_shown(found.get("better"))}; it must be "a", "b" or "tie"')
    return LabelledPair(**texts, better=found["better"], line=number)


def _shown(value: Any) -> str:
    return "missing" if value is None else json.dumps(value)[:60]


def pools_of(pairs: Sequence[LabelledPair], tokenizer: Tokenizer | None) -> list[CandidatePool]:
    """Each pair as a pool of two candidates, a and b.

    Args: tokenizer: the policy's; None: no criterion counts tokens.
    """
    return [
        CandidatePool(
            SipSample(i, i, 0, _NOTHING, _NOTHING),
            pair.prefix,
            tuple(_candidate(text, tokenizer) for text in (pair.a, pair.b)),
            0.0,
        )
        for i, pair in enumerate(pairs)
    ]


def _candidate(text: str, tokenizer: Tokenizer | None) -> Candidate:
    ids = np.array(tokenizer.encode(text), np.int32) if tokenizer else _NOTHING
    return Candidate("rollout", ids, text, np.zeros(0, np.float32), -1, "data")


def prefix_text_of(
    pairs: Sequence[LabelledPair], tokenizer: Tokenizer | None
) -> Callable[[SipSample, int], str]:
    """What a `Judge` asks for of the samples of `pools_of`."""

    def prefix_text(sample: SipSample, num_tokens: int) -> str:
        text = pairs[sample.sample_id].prefix
        assert tokenizer is not None
        ids = tokenizer.encode(text)
        return text if len(ids) <= num_tokens else tokenizer.decode(ids[-num_tokens:])

    return prefix_text


def check_suffixes(pairs: Sequence[LabelledPair], path: Path) -> None:
    """Raises: ValueError naming file and line of a pair without "suffix"."""
    for pair in pairs:
        if pair.suffix is None:
            raise ValueError(
                f'{path}, line {pair.line}: "suffix" is missing, which the prompt of a criterion '
                "shows; give it, or name a recipe without that criterion"
            )


def accuracies(
    pairs: Sequence[LabelledPair],
    rewards: Sequence[PoolRewards],
    verdicts: Sequence[Sequence[Verdict]],
    *,
    criteria: Sequence[Criterion],
    resamples: int,
    seed: int,
) -> tuple[Accuracy, ...]:
    """One row a criterion, then "total" (with its gates).

    Args: rewards, verdicts: one entry a pair, of pools that `pools_of` made, with every pair of a
          pairwise criterion asked in both orders.
    """
    scores = {c.name: [r.by_criterion[c.name] for r in rewards] for c in criteria}
    scores["total"] = [standing(r) for r in rewards]
    pairwise = {c.name for c in criteria if c.form == "pairwise"}
    rows = []
    for name, values in scores.items():
        sides = [float(np.sign(v[0] - v[1])) for v in values]  # NaN without a verdict
        orders = {first: [math.nan] * len(pairs) for first in (True, False)}
        if name in pairwise:
            orders = {
                first: [_side(known, name, a_first=first) for known in verdicts]
                for first in (True, False)
            }
        rows.append(
            _accuracy(name, pairs, sides=sides, orders=orders, resamples=resamples, seed=seed)
        )
    return tuple(rows)


def _side(verdicts: Sequence[Verdict], name: str, *, a_first: bool) -> float:
    """1 if `a` is preferred in this order of presentation, -1 if `b`, 0 for neither; NaN unknown.

    Several votes count by their mean.
    """
    scores = [
        v.score if v.candidate == 0 else 1.0 - v.score
        for v in verdicts
        if v.criterion == name
        and v.score is not None
        and (v.candidate == 0) == (v.candidate_first == a_first)
    ]
    return float(np.sign(math.fsum(scores) / len(scores) - 0.5)) if scores else math.nan


def _accuracy(
    name: str,
    pairs: Sequence[LabelledPair],
    *,
    sides: Sequence[float],
    orders: dict[bool, list[float]],
    resamples: int,
    seed: int,
) -> Accuracy:
    """Args: sides: 1: a is preferred, -1: b, 0: equal, NaN: unknown. orders: the same by "a is
    shown first"."""
    wanted = [{"a": 1.0, "b": -1.0, "tie": math.nan}[pair.better] for pair in pairs]
    right = [0.5 + 0.5 * w * s for w, s in zip(wanted, sides, strict=True)]
    first = [0.5 + 0.5 * w * orders[w > 0][i] for i, w in enumerate(wanted)]
    second = [0.5 + 0.5 * w * orders[w < 0][i] for i, w in enumerate(wanted)]
    same = [
        math.nan if math.isnan(x + y) else float(x * y >= 0)  # not on opposite sides
        for x, y in zip(orders[True], orders[False], strict=True)
    ]
    prefixes = [pair.prefix for pair in pairs]
    low, high = _interval(right, prefixes, resamples=resamples, seed=seed)
    same_low, same_high = _interval(same, prefixes, resamples=resamples, seed=seed)
    return Accuracy(
        name,
        mean_or_none(right),
        low,
        high,
        pairs=sum(not math.isnan(x) for x in right),
        missing=sum(math.isnan(side) for side in sides),
        better_first=mean_or_none(first),
        better_second=mean_or_none(second),
        consistent=mean_or_none(same),
        consistent_low=same_low,
        consistent_high=same_high,
    )


def _interval(
    values: Sequence[float], groups: Sequence[str], *, resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """Of the mean of what is not NaN; (None, None) of fewer than two prefixes."""
    rows = [i for i, value in enumerate(values) if not math.isnan(value)]
    owners = [groups[i] for i in rows]
    if len(set(owners)) < 2:
        return None, None
    known = [values[i] for i in rows]
    return bootstrap_interval(known, groups=owners, resamples=resamples, seed=seed)
