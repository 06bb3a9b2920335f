"""Rewrites of suffixes: ask the server, clean the reply, bring it back to policy tokens.

The prefix keeps its tokens; only the rewrite is encoded. A rewrite that is refused, empty or too
short leaves the pool and is counted; one that equals the suffix keeps the suffix's tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_sip import config
from megatron_sip.errors import RunFailed
from megatron_sip.judge.cache import Cache, content_key
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.rewrite_text import clean_rewrite
from megatron_sip.serving.client import HttpClient, RequestFailed, check_served_model, run
from megatron_sip.types import Candidate, SipSample

STOP = (">>>",)  # the prompt's own end mark


class PolicyTokenizer(Protocol):
    """What is needed of the policy's tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def continuation_text(self, prefix_ids: Any, ids: Any) -> tuple[str, str]: ...


class RewriterFailed(RunFailed):
    """Not one request of a call was answered."""


class Rewriter:
    """One rewrite of each sample's suffix; synchronous from outside."""

    def __init__(
        self,
        settings: config.Rewriter,
        *,
        server: ServedModel,
        cache: Cache,
        tokenizer: PolicyTokenizer,
        suffix_tokens: int,
    ) -> None:
        """Args: suffix_tokens: N, the limit of a rewrite in policy tokens.
        Raises: ValueError if the prompt does not take prefix and suffix.
        """
        self._settings, self._server, self._cache = settings, server, cache
        self._tokenizer, self._limit = tokenizer, suffix_tokens
        self._prompt = load_prompt(settings.prompt)
        if self._prompt.placeholders != {"prefix", "suffix"}:
            raise ValueError(
                f"rewriter.prompt is {settings.prompt}, whose placeholders are "
                f"{sorted(self._prompt.placeholders)}; they must be prefix and suffix"
            )

    def rewrite(
        self, samples: Sequence[SipSample], *, seed: int
    ) -> tuple[list[Candidate | None], dict[str, float]]:
        """One rewrite a sample, None where it was dropped.

        Returns: candidates in order; counts: rewrites (kept), copied (of these equal to the
                 suffix), dropped, failed (of these without a reply), cache_hits, seconds.
        Raises:  RewriterFailed if every request failed; ValueError if the server serves another
                 model.
        """
        start = time.monotonic()
        bodies = [self._body(sample) for sample in samples]
        keys = [self._key(body) for body in bodies]
        replies: list[Any] = [self._cache.get(key) for key in keys]
        missing = [i for i, reply in enumerate(replies) if reply is None]
        if missing:
            work = [(keys[i], {**bodies[i], "seed": _seed(seed, samples[i])}) for i in missing]
            for i, reply in zip(missing, asyncio.run(self._fetch(work)), strict=True):
                replies[i] = reply
        candidates = [
            None if reply is None else self._candidate(sample, reply)
            for sample, reply in zip(samples, replies, strict=True)
        ]
        kept = [(c, s) for c, s in zip(candidates, samples, strict=True) if c is not None]
        return candidates, {
            "rewrites": len(kept),
            "copied": sum(np.array_equal(c.token_ids, s.suffix_ids) for c, s in kept),
            "dropped": len(samples) - len(kept),
            "failed": sum(reply is None for reply in replies),
            "cache_hits": len(samples) - len(missing),
            "seconds": time.monotonic() - start,
        }

    def _body(self, sample: SipSample) -> dict[str, Any]:
        """The request without its seed: a rewrite is made once, whatever the run's seed."""
        near = sample.prefix_ids[-self._settings.prefix_tokens :]
        prefix, suffix = self._tokenizer.continuation_text(near, sample.suffix_ids)
        return {
            "model": self._server.endpoint.model,
            "prompt": self._server.tokenizer.render(
                self._prompt.messages,
                fields={"prefix": prefix, "suffix": suffix},
                answer=self._prompt.answer,
            ),
            "max_tokens": self._settings.max_tokens,
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
            "stop": list(STOP),
        }

    def _key(self, body: dict[str, Any]) -> str:
        prompt, server = self._prompt, self._server
        return content_key(
            {
                "kind": "rewrite",
                "prompt": [prompt.name, prompt.version, prompt.digest],
                "model": [server.endpoint.model, server.model_digest, server.tokenizer.digest],
                "request": body,
                "vote": 0,
            }
        )

    async def _fetch(self, work: list[tuple[str, dict[str, Any]]]) -> list[str | None]:
        """Replies as they came, stored at once; None where a request failed."""
        reasons = []
        deadline_s = self._settings.timeout_s

        async def ask(key: str, body: dict[str, Any]) -> str | None:
            try:
                reply = await client.post("/v1/completions", body, deadline_s=deadline_s)
                text = _text(reply, server=self._server.endpoint.name)
            except RequestFailed as error:
                reasons.append(str(error))
                return None
            self._cache.put(key, text)
            return text

        async with HttpClient(
            self._server.endpoint, concurrency=self._settings.concurrency
        ) as client:
            try:
                await check_served_model(client, self._server.endpoint.model, deadline_s=deadline_s)
            except RequestFailed as error:
                raise RewriterFailed(f"rewriter {error}; see whether it runs") from None
            replies = await run(ask(key, body) for key, body in work)
        if len(reasons) == len(work):
            raise RewriterFailed(
                f"rewriter: all {len(work)} requests failed; for example: {reasons[0]}; read the "
                "server's log, then lower rewriter.concurrency or raise rewriter.timeout_s"
            )
        return replies

    def _candidate(self, sample: SipSample, reply: str) -> Candidate | None:
        """The reply as a candidate; None if nothing of use is left of it."""
        _, suffix = self._tokenizer.continuation_text(sample.prefix_ids, sample.suffix_ids)
        text = clean_rewrite(reply, suffix=suffix)
        ids = sample.suffix_ids if text == suffix else self._tokenizer.encode(text)
        if not text or 2 * len(ids) < self._limit:
            return None
        token_ids = np.asarray(ids[: self._limit], dtype=np.int32)
        return Candidate(
            source="rewrite",
            token_ids=token_ids,
            text=self._tokenizer.continuation_text(sample.prefix_ids, token_ids)[1],
            logprobs=np.zeros(0, dtype=np.float32),
            policy_version=-1,
            finish_reason="length" if len(ids) > self._limit else "stop",
        )


def _text(reply: dict[str, Any], *, server: str) -> str:
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(text, str):
        raise RequestFailed(server, status=200, reason="the reply holds no text")
    return text


def _seed(seed: int, sample: SipSample) -> int:
    """31 bits that depend on the run's seed and the sample."""
    text = f"rewrite\0{seed}\0{sample.sample_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
