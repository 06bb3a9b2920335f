"""The servers of one call of the judge: clients, identity check, counts, and when to give up."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from megatron_sip import config
from megatron_sip.errors import RunFailed
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.serving.client import HttpClient, RequestFailed, check_served_model


class JudgeFailed(RunFailed):
    """Too many verdicts of one call are missing, or a judge's server is out of reach."""


class ServerPool:
    """Async context manager; a server is contacted, and its model checked, at the first use."""

    def __init__(self, servers: Mapping[str, ServedModel], *, settings: config.Judge) -> None:
        self._servers, self._settings = servers, settings
        self.slots = asyncio.Semaphore(settings.concurrency)  # questions in flight, all servers
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by cache key
        self.num_questions = self.num_not_asked = self.num_cache_hits = 0
        self.num_retries = self._num_prompt_tokens = self._num_failed = 0
        self._clients: dict[str, HttpClient] = {}
        self._checks: dict[str, asyncio.Future[None]] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> ServerPool:
        for name, server in self._servers.items():
            client = HttpClient(server.endpoint, concurrency=self._settings.concurrency)
            self._clients[name] = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        for check in self._checks.values():
            check.cancel()
        await asyncio.gather(*self._checks.values(), return_exceptions=True)
        await self._stack.aclose()

    async def complete(self, name: str, body: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
        """POST /v1/completions.

        Raises: RequestFailed; ValueError if the server serves another model; JudgeFailed if it
                does not say which one it serves.
        """
        await self._check(name)
        self._num_prompt_tokens += len(body["prompt"])
        return await self._clients[name].post(
            "/v1/completions",
            {"model": self._servers[name].endpoint.model, **body, "seed": seed},
            deadline_s=self._settings.timeout_s,
        )

    async def _check(self, name: str) -> None:
        if name not in self._checks:
            check = check_served_model(
                self._clients[name],
                self._servers[name].endpoint.model,
                deadline_s=self._settings.timeout_s,
            )
            self._checks[name] = asyncio.ensure_future(check)
        try:
            await self._checks[name]
        except RequestFailed as error:
            raise JudgeFailed(
                f"judge {error} (asked which model it serves); see whether it runs and is healthy"
            ) from None

    def fail(self, name: str, *, reason: str) -> None:
        """Count a question that was sent and got no verdict.

        Raises: JudgeFailed once these are more than judge.max_missing_rate of all questions.
        """
        self._num_failed += 1
        limit = self._settings.max_missing_rate
        if self._num_failed > limit * self.num_questions:
            rate = self._num_failed / self.num_questions
            raise JudgeFailed(
                f"judge server {name}: at least {self._num_failed} of {self.num_questions} "
                f"verdicts are missing ({rate:.1%}), judge.max_missing_rate is {limit:.1%}; for "
                f"example: {reason}; read the server's log, then lower judge.concurrency, raise "
                "judge.timeout_s or correct the prompt"
            )

    def counts(self) -> dict[str, float]:
        """What `Judge.judge_pools` reports beside verdicts and time."""
        return {
            "not_asked": self.num_not_asked,
            "cache_hits": self.num_cache_hits,
            "retries": self.num_retries + sum(c.num_retries for c in self._clients.values()),
            "prompt_tokens": self._num_prompt_tokens,
        }
