"""Rewrites of suffixes: ask the server, clean the reply, bring it back to policy tokens.

The prefix keeps its tokens; only the rewrite is encoded. What is not fit to be a candidate leaves
the pool and is counted by its reason; what equals the suffix keeps the suffix's tokens. Replies are
kept by content, so it makes no difference whether they were made before the run or in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_sip import config_judge
from megatron_sip.errors import RunFailed
from megatron_sip.judge.cache import Cache, content_key
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.rewriting.acceptance import COPIED, FAILED, KEPT, REASONS, outcome_of
from megatron_sip.rewriting.text import clean_rewrite, prompt_fields, stop_marks
from megatron_sip.serving.client import HttpClient, RequestFailed, check_served_model, run
from megatron_sip.types import Candidate, SipSample

NEEDED = frozenset({"prefix", "suffix"})
TAKEN = NEEDED | {"last_words", "num_words", "nonce"}
NO_TOKENS = np.zeros(0, dtype=np.int32)


class PolicyTokenizer(Protocol):
    """What is needed of the policy's tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def continuation_text(self, prefix_ids: Any, ids: Any) -> tuple[str, str]: ...


class RewriterFailed(RunFailed):
    """Not one request of a call was answered."""


@dataclass(frozen=True)
class Rewrite:
    """What came of asking for one rewrite."""

    reply: str | None  # as the server gave it; None: no reply
    text: str  # cleaned, cut to N tokens
    token_ids: np.ndarray  # int32[<= N]
    finish_reason: str  # "length": cut by N or by rewriter.max_tokens; "stop"
    outcome: str  # as `outcome_of` says, or FAILED
    cached: bool
    failure: str = ""  # why no reply came

    @property
    def candidate(self) -> Candidate | None:
        """The rewrite as a candidate; None if it was dropped."""
        if self.outcome not in (KEPT, COPIED):
            return None
        nothing = np.zeros(0, dtype=np.float32)
        return Candidate("rewrite", self.token_ids, self.text, nothing, -1, self.finish_reason)


class Rewriter:
    """One rewrite of each sample's suffix; synchronous from outside."""

    def __init__(
        self,
        settings: config_judge.Rewriter,
        *,
        server: ServedModel,
        cache: Cache,
        tokenizer: PolicyTokenizer,
        suffix_tokens: int,
    ) -> None:
        """Args: suffix_tokens: N, the limit of a rewrite in policy tokens.
        Raises: ValueError if the prompt does not take prefix and suffix, or the server's tokenizer
                is not known.
        """
        if server.tokenizer is None:
            name = server.endpoint.name
            raise ValueError(
                f"rewriter.server {name} has no tokenizer, with which prompts are made; give "
                f"servers.{name}.tokenizer"
            )
        server.tokenizer.require_template()
        self._settings, self._server, self._cache = settings, server, cache
        self._server_tokenizer = server.tokenizer
        self._tokenizer, self._limit = tokenizer, suffix_tokens
        self._prompt = load_prompt(settings.prompt)
        if not NEEDED <= self._prompt.placeholders <= TAKEN or self._prompt.labels:
            raise ValueError(
                f"rewriter.prompt is {settings.prompt}, whose placeholders are "
                f"{sorted(self._prompt.placeholders)}; it needs {sorted(NEEDED)}, may have "
                f"{sorted(TAKEN - NEEDED)}, and has no labels"
            )

    def rewrite(
        self,
        samples: Sequence[SipSample],
        *,
        seed: int,
        unsafe: Sequence[bool | None] | None = None,
    ) -> tuple[list[Candidate | None], dict[str, float]]:
        """One rewrite a sample, None where it was dropped.

        Args:    unsafe: whether each suffix is, None where nobody knows.
        Returns: candidates in order; counts: rewrites (kept), copied (of these equal to the
                 suffix), dropped, failed (of these without a reply), dropped_REASON (the others of
                 these), cache_hits, seconds.
        Raises:  RewriterFailed if every request failed, and most samples needed one, or the server
                 does not say what it serves; ValueError if it serves another model.
        """
        start = time.monotonic()
        found = self.write(samples, seed=seed, unsafe=unsafe)
        asked = [rewrite for rewrite in found if not rewrite.cached]
        if 2 * len(asked) > len(found) and all(rewrite.failure for rewrite in asked):
            raise RewriterFailed(
                f"rewriter: all {len(asked)} requests failed; for example: {asked[0].failure}; "
                "read the server's log, then lower rewriter.concurrency or raise rewriter.timeout_s"
            )
        outcomes = Counter(rewrite.outcome for rewrite in found)
        kept = outcomes[KEPT] + outcomes[COPIED]
        return [rewrite.candidate for rewrite in found], {
            "rewrites": kept,
            "copied": outcomes[COPIED],
            "dropped": len(found) - kept,
            "failed": outcomes[FAILED],
            **{f"dropped_{reason}": outcomes[reason] for reason in REASONS},
            "cache_hits": sum(rewrite.cached for rewrite in found),
            "seconds": time.monotonic() - start,
        }

    def write(
        self,
        samples: Sequence[SipSample],
        *,
        seed: int,
        unsafe: Sequence[bool | None] | None = None,
    ) -> list[Rewrite]:
        """As `rewrite`, with all that is known of each; failed requests never raise."""
        bodies = [self._body(sample) for sample in samples]
        keys = [self._key(body) for body in bodies]
        replies = {key: self._cache.get(key) for key in keys}
        failures: dict[str, str] = {}
        stored = {key for key, reply in replies.items() if reply is not None}
        work = {
            key: {**body, "seed": _seed(seed, sample)}
            for key, body, sample in zip(keys, bodies, samples, strict=True)
            if key not in stored
        }
        if work:
            fetched, failures = asyncio.run(self._fetch(work))
            replies |= fetched
        known = unsafe if unsafe is not None else [None] * len(samples)
        return [
            self._read(sample, replies[key], unsafe=bad, cached=key in stored)
            if key not in failures
            else Rewrite(None, "", NO_TOKENS, "", FAILED, False, failures[key])
            for sample, key, bad in zip(samples, keys, known, strict=True)
        ]

    def _body(self, sample: SipSample) -> dict[str, Any]:
        """The request without its seed: a rewrite is made once, whatever the run's seed."""
        near = sample.prefix_ids[-self._settings.prefix_tokens :]
        prefix, suffix = self._tokenizer.continuation_text(near, sample.suffix_ids)
        return {
            "model": self._server.endpoint.model,
            "prompt": self._server_tokenizer.render(
                self._prompt.messages,
                fields=prompt_fields(prefix, suffix, self._prompt.placeholders),
                answer=self._prompt.answer,
            ),
            "max_tokens": self._settings.max_tokens,
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
            "stop": stop_marks(self._prompt.answer, suffix=suffix),
        }

    def _key(self, body: dict[str, Any]) -> str:
        prompt, server = self._prompt, self._server
        return content_key(
            {
                "kind": "rewrite",
                "prompt": [prompt.name, prompt.version, prompt.digest],
                "model": [
                    server.endpoint.model,
                    server.model_digest,
                    self._server_tokenizer.digest,
                ],
                "request": body,
                "vote": 0,
            }
        )

    async def _fetch(
        self, work: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Replies by key as they came, stored at once; and why there is none, by key."""
        replies: dict[str, dict[str, str]] = {}
        failures: dict[str, str] = {}
        deadline_s = self._settings.timeout_s

        async def ask(key: str, body: dict[str, Any]) -> None:
            try:
                reply = await client.post("/v1/completions", body, deadline_s=deadline_s)
                replies[key] = _reply_of(reply, server=self._server.endpoint.name)
            except RequestFailed as error:
                failures[key] = str(error)
                return
            self._cache.put(key, replies[key])

        async with HttpClient(
            self._server.endpoint, concurrency=self._settings.concurrency
        ) as client:
            try:
                await check_served_model(client, self._server.endpoint.model, deadline_s=deadline_s)
            except RequestFailed as error:
                raise RewriterFailed(f"rewriter {error}; see whether it runs") from None
            await run(ask(key, body) for key, body in work.items())
        return replies, failures

    def _read(self, sample: SipSample, reply: Any, *, unsafe: bool | None, cached: bool) -> Rewrite:
        """A stored or new reply, judged."""
        said, ended = (reply, "stop") if isinstance(reply, str) else (
            reply["text"], reply["finish_reason"]
        )  # fmt: skip
        prefix, suffix = self._tokenizer.continuation_text(sample.prefix_ids, sample.suffix_ids)
        text = clean_rewrite(said, prefix=prefix, suffix=suffix)
        copied = bool(text) and text == suffix
        ids = sample.suffix_ids if copied else self._tokenizer.encode(text)
        token_ids = np.asarray(ids[: self._limit], dtype=np.int32)
        outcome = outcome_of(
            text, token_ids=token_ids, sample=sample, prefix=prefix, suffix=suffix, unsafe=unsafe
        )
        cut = len(ids) > self._limit or (ended == "length" and not copied)
        return Rewrite(
            reply=said,
            text=self._tokenizer.continuation_text(sample.prefix_ids, token_ids)[1],
            token_ids=token_ids,
            finish_reason="length" if cut else "stop",
            outcome=outcome,
            cached=cached,
        )


def _reply_of(reply: dict[str, Any], *, server: str) -> dict[str, str]:
    """What is kept of a server's reply. Raises: RequestFailed if it holds no text."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(text, str):
        raise RequestFailed(server, status=200, reason="the reply holds no text")
    return {"text": text, "finish_reason": str(choice.get("finish_reason") or "stop")}


def _seed(seed: int, sample: SipSample) -> int:
    """31 bits that depend on the run's seed and the sample."""
    text = f"rewrite\0{seed}\0{sample.sample_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
