"""One question: its text, its request, its place in the cache, its verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megatron_sip import config
from megatron_sip.judge.cache import Cache, content_key
from megatron_sip.judge.criteria import FORMS, Request, Subject, UnusableReply
from megatron_sip.judge.prompts import Prompt, load_prompt
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.servers import ServerPool
from megatron_sip.serving.client import RequestFailed
from megatron_sip.types import CandidatePool, Question, SipSample, Verdict

ATTEMPTS = 2  # an unusable reply is asked for once more, with another seed


class Asker:
    """Answers single questions of some criteria from the cache, else from their servers."""

    def __init__(
        self,
        criteria: Sequence[config.AskedCriterion],
        *,
        servers: Mapping[str, ServedModel],
        cache: Cache,
        prefix_text: Callable[[SipSample, int], str],
    ) -> None:
        """Raises: ValueError naming a criterion whose server or prompt does not fit."""
        self._criteria = {c.name: c for c in criteria}
        self._prompts = {c.name: _prompt(c, servers) for c in criteria}
        self._servers, self._cache, self._prefix_text = servers, cache, prefix_text

    async def answer(
        self, pool: CandidatePool, *, question: Question, servers: ServerPool, seed: int
    ) -> Verdict:
        """The verdict on one question; score None and a reason where there is none.

        Raises: JudgeFailed, ValueError as `ServerPool.complete` and `ServerPool.fail` do.
        """
        criterion, prompt = self._criteria[question.criterion], self._prompts[question.criterion]
        server, form = self._servers[criterion.server], FORMS[criterion.form]
        async with servers.slots:
            verdict = Verdict(
                question.criterion, question.candidate, question.opponent, question.vote, None, ""
            )
            try:
                request = form.build(
                    self._subject(pool, question),
                    question=question,
                    criterion=criterion,
                    tokenizer=server.tokenizer,
                    prompt=prompt,
                )
            except UnusableReply as error:
                servers.num_not_asked += 1
                return replace(verdict, reply=str(error))
            key = self._key(question, request=request)
            async with servers.locks[key]:  # equal questions of one call are paid for once
                value = self._cache.get(key)
                servers.num_cache_hits += value is not None
                if value is None:
                    try:
                        value = await self._ask(
                            criterion,
                            request=request,
                            servers=servers,
                            seeds=[
                                derived_seed(seed, pool.sample.sample_id, question, n)
                                for n in range(ATTEMPTS)
                            ],
                        )
                    except (UnusableReply, RequestFailed) as error:
                        servers.fail(criterion.server, reason=str(error))
                        return replace(verdict, reply=str(error))
                    self._cache.put(key, value)
        flip = form.pairwise and not question.candidate_first  # stored: of the first presented
        said = f"{value:.6g}" + (", candidate second" if flip else "")
        return replace(verdict, score=1.0 - value if flip else value, reply=said)

    def _key(self, question: Question, *, request: Request) -> str:
        """Cache key; the answer stored under it is about the texts as presented."""
        criterion, prompt = self._criteria[question.criterion], self._prompts[question.criterion]
        server = self._servers[criterion.server]
        return content_key(
            {
                "kind": criterion.form,
                "prompt": [prompt.name, prompt.version, prompt.digest] if prompt else None,
                "model": [server.endpoint.model, server.model_digest, server.tokenizer.digest],
                "request": request.body,
                "scored": request.scored,
                "vote": question.vote,
            }
        )

    async def _ask(
        self,
        criterion: config.AskedCriterion,
        *,
        request: Request,
        servers: ServerPool,
        seeds: Sequence[int],
    ) -> float:
        """Raises: RequestFailed; UnusableReply if the last attempt's reply is unusable."""
        for seed in seeds[:-1]:
            reply = await servers.complete(criterion.server, request.body, seed=seed)
            try:
                return FORMS[criterion.form].parse(reply, request)
            except UnusableReply:
                servers.num_retries += 1
        reply = await servers.complete(criterion.server, request.body, seed=seeds[-1])
        return FORMS[criterion.form].parse(reply, request)

    def _subject(self, pool: CandidatePool, question: Question) -> Subject:
        criterion = self._criteria[question.criterion]
        prefix = pool.prefix_text
        if isinstance(criterion, config.LikelihoodCriterion):
            prefix = self._prefix_text(pool.sample, criterion.prefix_tokens)
        opponent = pool.candidates[question.opponent].text if question.opponent >= 0 else ""
        return Subject(prefix, pool.candidates[question.candidate].text, opponent)


def _prompt(criterion: config.AskedCriterion, servers: Mapping[str, ServedModel]) -> Prompt | None:
    """The criterion's prompt, checked against its form and its server's tokenizer."""
    where = f"judge criterion {criterion.name}"
    if criterion.server not in servers:
        raise ValueError(f"{where} names server {criterion.server}, there are {sorted(servers)}")
    if isinstance(criterion, config.LikelihoodCriterion):
        return None
    prompt = load_prompt(criterion.prompt)
    options = {"option_1", "option_2"}
    allowed = {"prefix"} | (options if FORMS[criterion.form].pairwise else {"candidate"})
    needed = allowed - {"prefix"}
    if len(prompt.labels) != 2 or not needed <= prompt.placeholders <= allowed:
        raise ValueError(
            f"{where}: prompt {prompt.name} does not fit the form {criterion.form}, which needs "
            f"two labels and the placeholders {sorted(needed)}"
        )
    for label in prompt.labels:
        servers[criterion.server].tokenizer.label_id(label)
    return prompt


def derived_seed(*parts: object) -> int:
    """31 bits that depend on all parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
