"""Lengths of prefixes and prompts: measured on a few real samples, else from the recipe's limits.

Measured prompts are built by the judge's own code, with the original suffix as every candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.assembly import open_data, sampler_of
from megatron_sip.config import Config
from megatron_sip.config_judge import (
    AskedCriterion,
    GradedCriterion,
    LikelihoodCriterion,
    NoveltyCriterion,
    PairwiseCriterion,
    PointwiseCriterion,
)
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.judge.criteria import Subject, UnusableReply, fields_of
from megatron_sip.judge.forms import form_of, needs_tokenizer
from megatron_sip.judge.prompts import Prompt, load_prompt
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.rewriting.text import prompt_fields
from megatron_sip.types import Question

NUM_SAMPLES = 32
CHARACTERS_PER_TOKEN = 4  # of a prompt's own words
ASSUMED_VOCAB_SIZE = 32_000


@dataclass(frozen=True)
class Data:
    """What the data files say; None where they are missing."""

    vocab_size: int
    vocab_size_assumed: bool
    train_tokens: int | None
    train_documents: int | None
    eligible_documents: int | None
    passes: float | None
    """Passes over the eligible documents that the whole run makes."""
    missing: str
    """Why something above is None or assumed; empty if nothing is."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of one request, on average where `measured`, else at the most."""

    prefix: float
    """Of the prefix, policy tokens."""
    prompts: dict[str, float]
    """Whole prompt by the role that sends it, such as "judge: NAME"; the server's tokens."""
    shared: dict[str, float]
    """Its beginning that all prompts of a pool share."""
    measured: dict[str, bool]


def open_files(config: Config) -> tuple[Data, Any, Any]:
    """What can be known of the data, with tokenizer and sampler (None where it is missing).

    Without the tokenizer its size is assumed, since all parameter counts depend on it.
    """
    try:
        tokenizer, datasets = open_data(config)
        sampler = sampler_of(config, datasets["train"], tokenizer, config.run.seed)
    except ValueError as error:
        return (*_without_data(config, str(error)), None)
    train = datasets["train"]
    samples = config.run.steps * config.data.global_batch_size
    data = Data(
        vocab_size=config.model.vocabulary(tokenizer.vocab_size),
        vocab_size_assumed=False,
        train_tokens=train.tokens,
        train_documents=train.num_documents,
        eligible_documents=sampler.num_eligible,
        passes=samples / sampler.num_eligible,
        missing="",
    )
    return data, tokenizer, sampler


def _without_data(config: Config, reason: str) -> tuple[Data, Any]:
    try:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    except ValueError:
        tokenizer = None
    size = config.model.vocabulary(tokenizer.vocab_size if tokenizer else ASSUMED_VOCAB_SIZE)
    assumed = tokenizer is None and config.model.vocab_size is None
    return Data(size, assumed, None, None, None, None, reason), tokenizer


def measure_lengths(config: Config, tokenizer: Any, sampler: Any) -> Lengths:
    """Mean lengths over a few samples, where data and the server's tokenizer are there.

    Raises: ValueError if prompts are to be sent as token ids and there is no chat template.
    """
    samples = [sampler[i] for i in range(NUM_SAMPLES)] if sampler else []
    prefix = float(config.data.prefix_tokens)
    if samples:
        prefix = sum(len(s.prefix_ids) for s in samples) / len(samples)
    lengths = Lengths(prefix, {}, {}, {"prefix": bool(samples)})
    if config.run.task != "sip":
        return lengths
    tokenizers: dict[str, JudgeTokenizer | None] = {}
    for name, asker in _askers(config).items():
        if asker.server not in tokenizers:
            tokenizers[asker.server] = _judge_tokenizer(config, asker.server)
        judge = _that_can_measure(asker, tokenizers[asker.server])
        found = [_measured(asker, s, tokenizer, judge) for s in samples] if judge else []
        pairs = [pair for pair in found if pair is not None]
        whole, shared = _assumed(asker, config)
        if pairs:
            whole, shared = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        lengths.prompts[name], lengths.shared[name] = whole, shared
        lengths.measured[name] = bool(pairs)
    return lengths


@dataclass(frozen=True)
class _Asker:
    """One kind of request: a criterion, or the rewriter (no criterion)."""

    server: str
    prefix_tokens: int | None  # of the prefix's last policy tokens; None: all of them
    prompt: Prompt | None
    criterion: AskedCriterion | None
    num_candidates: int  # that stand in the prompt


def _askers(config: Config) -> dict[str, _Asker]:
    """All kinds of requests by role."""
    assert config.judge is not None
    evaluation = LikelihoodCriterion(
        form="likelihood",
        name="evaluation",
        server=config.evaluation.server,
        prefix_tokens=config.evaluation.prefix_tokens,
    )
    askers = {}
    criteria = {f"judge: {c.name}": c for c in config.judge.criteria}
    for role, criterion in {**criteria, "evaluation: judge": evaluation}.items():
        if isinstance(criterion, PairwiseCriterion | PointwiseCriterion | GradedCriterion):
            askers[role] = _Asker(
                criterion.servers[0], None, load_prompt(criterion.prompt), criterion,
                2 if criterion.form == "pairwise" else 1,
            )  # fmt: skip
        elif not isinstance(criterion, NoveltyCriterion):
            server, seen = criterion.servers[0], criterion.prefix_tokens
            askers[role] = _Asker(server, seen, None, criterion, 1)
    if config.rewriter:
        askers["rewrite"] = _Asker(
            config.rewriter.server, config.rewriter.prefix_tokens,
            load_prompt(config.rewriter.prompt), None, 1,
        )  # fmt: skip
    return askers


def _judge_tokenizer(config: Config, server: str) -> JudgeTokenizer | None:
    settings = config.servers[server]
    folder = settings.tokenizer if settings.kind == "connect" else Path(settings.model)
    if folder is None:
        return None
    try:
        return JudgeTokenizer(folder)
    except ValueError:
        return None


def _that_can_measure(asker: _Asker, judge: JudgeTokenizer | None) -> JudgeTokenizer | None:
    """The tokenizer, None if it has no template and its server is the one that needs it."""
    if judge is None or asker.prompt is None or judge.has_template:
        return judge
    if asker.criterion is None or needs_tokenizer(asker.criterion):
        judge.require_template()
    return None


def _measured(
    asker: _Asker, sample: Any, tokenizer: Any, judge: JudgeTokenizer
) -> tuple[float, float] | None:
    """(prompt, its shared beginning) of one sample, the server's tokens; None if not asked."""
    longest = len(sample.prefix_ids) if asker.prefix_tokens is None else asker.prefix_tokens
    near = sample.prefix_ids[max(0, len(sample.prefix_ids) - longest) :]
    prefix, suffix = tokenizer.continuation_text(near, sample.suffix_ids)
    if asker.criterion is None:
        assert asker.prompt is not None
        fields = prompt_fields(prefix, suffix, asker.prompt.placeholders)
        ids = judge.render(asker.prompt.messages, fields=fields, answer=asker.prompt.answer)
        return len(ids), 0.0
    question = Question(asker.criterion.name, 0, 1 if asker.num_candidates > 1 else -1, 0, True)
    subject = Subject(prefix, suffix, suffix, suffix)
    if asker.prompt is not None:
        fields = fields_of(subject, question, asker.prompt)
        ids = judge.render(asker.prompt.messages, fields=fields, answer=asker.prompt.answer)
        return len(ids), float(_prefix_tokens(asker, prefix, judge))
    try:
        request = form_of(asker.criterion).build(
            subject,
            question=question,
            criterion=asker.criterion,
            tokenizer=judge,
            prompt=asker.prompt,
        )
    except UnusableReply:  # nothing to score, such as white space alone
        return None
    ids = request.body.get("prompt") or request.body["input"]
    return len(ids), float(_prefix_tokens(asker, prefix, judge))


def _prefix_tokens(asker: _Asker, prefix: str, judge: JudgeTokenizer) -> int:
    sees_prefix = asker.prompt is None or "prefix" in asker.prompt.placeholders
    return len(judge.encode_continuation(prefix, continuation="")[0]) if sees_prefix else 0


def _assumed(asker: _Asker, config: Config) -> tuple[float, float]:
    """The same from the recipe's limits: one of the server's tokens for one of the policy's."""
    longest, words = config.data.prefix_tokens, 0
    prefix = min(longest, longest if asker.prefix_tokens is None else asker.prefix_tokens)
    if asker.prompt is not None:
        words = sum(len(text) for _, text in asker.prompt.messages) + len(asker.prompt.answer)
        prefix *= "prefix" in asker.prompt.placeholders
    candidates = asker.num_candidates * config.data.suffix_tokens
    shared = 0 if asker.criterion is None else prefix
    return float(prefix + candidates + words // CHARACTERS_PER_TOKEN), float(shared)
