"""One question: its text, its request, its place in the cache, its verdict."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from megatron_sip import config_judge
from megatron_sip.judge.cache import Paid, content_key
from megatron_sip.judge.criteria import Request, Subject, UnusableReply, is_pairwise
from megatron_sip.judge.forms import form_of, needs_tokenizer
from megatron_sip.judge.prompts import Prompt, check_form, load_prompt
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.servers import ServerPool, tokens_of
from megatron_sip.serving.client import RequestFailed
from megatron_sip.types import CandidatePool, Question, SipSample, Verdict

ATTEMPTS = 2  # an unusable reply is asked for once more, with another seed


class Store(Protocol):
    """Where verdicts are kept: a `Cache`."""

    def get(self, key: str) -> Any: ...

    def put(self, key: str, value: Any, paid: Paid | None = None) -> None: ...

    def refresh(self) -> None: ...


class Asker:
    """Answers single questions of some criteria from the cache, else from their servers."""

    def __init__(
        self,
        criteria: Sequence[config_judge.AskedCriterion],
        *,
        servers: Mapping[str, ServedModel],
        cache: Store,
        prefix_text: Callable[[SipSample, int], str],
        suffix_text: Callable[[SipSample], str],
        run: str,
    ) -> None:
        """Args: run: who pays, for the cache.
        Raises: ValueError naming a criterion whose servers or prompt do not fit.
        """
        for criterion in criteria:
            _check_servers(criterion, servers)
        self._criteria = {c.name: c for c in criteria}
        self._prompts = {c.name: _prompt(c, servers) for c in criteria}
        self._servers, self._cache, self._run = servers, cache, run
        self._prefix_text, self._suffix_text = prefix_text, suffix_text

    async def answer(
        self, pool: CandidatePool, *, question: Question, servers: ServerPool, seed: int
    ) -> tuple[Verdict, bool]:
        """The verdict on one question, its score None and a reason where there is none; and whether
        a server failed, so that asking again may help.

        Raises: Outage, ValueError as `ServerPool.complete` and `ServerPool.fail` do.
        """
        criterion = self._criteria[question.criterion]
        form, server = form_of(criterion), self._servers[criterion.servers[0]]
        verdict = Verdict(
            question.criterion,
            question.candidate,
            question.opponent,
            question.vote,
            None,
            "",
            question.candidate_first,
        )
        async with servers.slots:
            try:
                request = form.build(
                    self._subject(pool, question),
                    question=question,
                    criterion=criterion,
                    tokenizer=server.tokenizer,
                    prompt=self._prompts[question.criterion],
                )
            except UnusableReply as error:
                servers.num_not_asked += 1
                return replace(verdict, reply=str(error)), False
            key = self._key(question, request=request)
            async with servers.lock(key):  # equal questions of one call are paid for once
                value = self._cache.get(key)
                servers.num_cache_hits += value is not None
                if value is None:
                    home = derived_seed("home", pool.prefix_text) % len(criterion.servers)
                    names = criterion.servers[home:] + criterion.servers[:home]
                    seeds = [
                        derived_seed(seed, pool.sample.sample_id, question, n)
                        for n in range(ATTEMPTS)
                    ]
                    try:
                        value, paid = await self._ask(
                            names, request, question=question, servers=servers, seeds=seeds
                        )
                    except (UnusableReply, RequestFailed) as error:
                        servers.fail(names, error)
                        return replace(verdict, reply=str(error)), True
                    self._cache.put(key, value, paid)
        flip = is_pairwise(criterion) and not question.candidate_first
        said = f"{value:.6g}" + (", candidate second" if flip else "")
        return replace(verdict, score=1.0 - value if flip else value, reply=said), False

    def _key(self, question: Question, *, request: Request) -> str:
        """Cache key; the answer stored under it is about the texts as presented."""
        criterion, prompt = self._criteria[question.criterion], self._prompts[question.criterion]
        server = self._servers[criterion.servers[0]]
        tokenizer = server.tokenizer.digest if server.tokenizer else ""
        parts = {
            "kind": criterion.form,
            "prompt": [prompt.name, prompt.version, prompt.digest] if prompt else None,
            "model": [server.endpoint.model, server.model_digest, tokenizer],
            "request": request.body,
            "scored": request.scored,
            "vote": question.vote,
        }
        if not request.is_sampled:
            parts |= {"route": request.route, "output": request.output}
        return content_key(parts)

    async def _ask(
        self,
        names: Sequence[str],
        request: Request,
        *,
        question: Question,
        servers: ServerPool,
        seeds: Sequence[int],
    ) -> tuple[float, Paid]:
        """The value and what it cost; one attempt a seed.

        Raises: RequestFailed; UnusableReply if the last attempt's reply is unusable.
        """
        criterion, prompt = self._criteria[question.criterion], self._prompts[question.criterion]
        for seed in seeds:
            begun = time.perf_counter()
            reply = await servers.complete(names, request, seed=seed)
            try:
                value = form_of(criterion).parse(reply, request)
            except UnusableReply:
                if seed == seeds[-1]:
                    raise
                servers.num_retries += 1
                continue
            prompt_tokens, completion_tokens = tokens_of(reply, request)
            return value, Paid(
                kind=criterion.form,
                criterion=criterion.name,
                prompt=prompt.name if prompt else "",
                model=self._servers[names[0]].endpoint.model,
                vote=question.vote,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                seconds=time.perf_counter() - begun,
                run=self._run,
            )
        raise AssertionError

    def _subject(self, pool: CandidatePool, question: Question) -> Subject:
        criterion, prompt = self._criteria[question.criterion], self._prompts[question.criterion]
        prefix = pool.prefix_text
        if not isinstance(criterion, config_judge.PromptedCriterion):
            prefix = self._prefix_text(pool.sample, criterion.prefix_tokens)
        opponent = pool.candidates[question.opponent].text if question.opponent >= 0 else ""
        needs_suffix = prompt is not None and "suffix" in prompt.placeholders
        suffix = self._suffix_text(pool.sample) if needs_suffix else ""
        return Subject(prefix, pool.candidates[question.candidate].text, opponent, suffix)


def _check_servers(
    criterion: config_judge.AskedCriterion, servers: Mapping[str, ServedModel]
) -> None:
    """Raises: ValueError if a server is not there, or they serve different models."""
    where = f"judge criterion {criterion.name}"
    for name in criterion.servers:
        if name not in servers:
            raise ValueError(f"{where} names server {name}, there are {sorted(servers)}")
        if needs_tokenizer(criterion) and servers[name].tokenizer is None:
            raise ValueError(
                f"{where} sends token ids to server {name}, which has no tokenizer in the recipe; "
                f"give servers.{name}.tokenizer, or read verdicts from a reasoned answer"
            )
    identities = {(servers[n].endpoint.model, servers[n].model_digest) for n in criterion.servers}
    if len(identities) > 1:
        models = ", ".join(f"{n}: {servers[n].endpoint.model}" for n in criterion.servers)
        raise ValueError(f"{where}: its servers must serve one model, but serve {models}")


def _prompt(
    criterion: config_judge.AskedCriterion, servers: Mapping[str, ServedModel]
) -> Prompt | None:
    """The criterion's prompt, checked against its form and its server's tokenizer."""
    if not isinstance(criterion, config_judge.PromptedCriterion):
        return None
    prompt = load_prompt(criterion.prompt)
    try:
        check_form(prompt, criterion.form)
    except ValueError as error:
        raise ValueError(f"judge criterion {criterion.name}: {error}") from None
    tokenizer = servers[criterion.servers[0]].tokenizer
    if needs_tokenizer(criterion):
        assert tokenizer is not None
        tokenizer.require_template()
        for label in prompt.labels:
            tokenizer.label_id(label)
    return prompt


def derived_seed(*parts: object) -> int:
    """31 bits that depend on all parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
