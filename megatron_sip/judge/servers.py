"""The servers of one call of the judge: clients, identity check, counts, patience, giving up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any
from weakref import WeakValueDictionary

from megatron_sip import config_judge
from megatron_sip.errors import RunFailed
from megatron_sip.judge.criteria import Request
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.serving.client import HttpClient, RequestFailed, check_served_model
from megatron_sip.supervision.heartbeat import HEART

LONGEST_PAUSE_S = 30.0
PAID = ("paid", "prompt_tokens", "completion_tokens", "money")  # of `counts`, what is spent
FEWEST_IN_A_ROW = 8  # failures that say that a server is down
CHARACTERS_PER_TOKEN = 4  # of text whose tokens the server does not count
log = logging.getLogger(__name__)


class JudgeFailed(RunFailed):
    """Too many verdicts of one call are missing, or a judge's server is out of reach."""


class Outage(Exception):
    """A judge's server fails so often that asking on makes no sense now; the message says why."""


class ServerPool:
    """Async context manager; a server is contacted, and its model checked, at the first use."""

    def __init__(self, servers: Mapping[str, ServedModel], *, settings: config_judge.Judge) -> None:
        self._servers, self._settings = servers, settings
        self.slots = asyncio.Semaphore(settings.concurrency)  # questions in flight, all servers
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.num_questions = self.num_not_asked = self.num_cache_hits = self.num_retries = 0
        self._num_prompt_tokens = self._num_completion_tokens = self._num_paid = 0
        self._num_failed = self._num_failed_in_a_row = self._num_outages = self._pauses = 0
        self._down: set[str] = set()  # of several servers, those that failed since the last pause
        self._money = self._give_up_at = 0.0
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

    def lock(self, key: str) -> asyncio.Lock:
        """The lock of a cache key; it is forgotten when nobody holds it or waits for it."""
        return self._locks.setdefault(key, asyncio.Lock())

    async def complete(self, names: Sequence[str], request: Request, *, seed: int) -> Any:
        """Send a request to the first of these servers that answers it.

        Raises: RequestFailed of the last one; ValueError if a server serves another model; Outage
                if none says what it serves.
        """
        failures: list[Exception] = []
        for name in sorted(names, key=lambda name: name in self._down):  # those that are down last
            try:
                return await self._complete(name, request, seed=seed)
            except (RequestFailed, Outage) as error:
                failures.append(error)
                if _is_down(error) and name not in self._down and len(names) > 1:
                    self._down.add(name)
                    log.warning("%s; the other servers are asked first now", error)
        raise next((e for e in failures if isinstance(e, RequestFailed)), failures[0])

    async def _complete(self, name: str, request: Request, *, seed: int) -> dict[str, Any]:
        await self._check(name)
        body = {"model": self._servers[name].endpoint.model, **request.body}
        reply = await self._clients[name].post(
            request.route,
            body | {"seed": seed} if request.is_sampled else body,
            deadline_s=self._settings.timeout_s,
        )
        prompt, written = tokens_of(reply, request)
        server = self._servers[name]
        self._num_paid += 1
        self._num_prompt_tokens += prompt
        self._num_completion_tokens += written
        self._money += (prompt * server.prompt_price + written * server.completion_price) / 1e6
        self._num_failed_in_a_row = 0
        return reply

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
            raise Outage(
                f"judge {error} (asked which model it serves); see whether it runs and is healthy"
            ) from None

    def fail(self, names: Sequence[str], reason: Exception) -> None:
        """Count a question that was sent and got no verdict.

        Raises: Outage once these are more than judge.max_missing_rate of all questions, or if as
                many in a row as may be in flight met a server that is down.
        """
        self._num_failed += 1
        self._num_failed_in_a_row += _is_down(reason)
        limit, in_flight = self._settings.max_missing_rate, self._settings.concurrency
        in_a_row = limit < 1 and self._num_failed_in_a_row >= max(FEWEST_IN_A_ROW, in_flight)
        if self._num_failed > limit * self.num_questions or in_a_row:
            rate = self._num_failed / self.num_questions
            raise Outage(
                f"judge server {', '.join(names)}: at least {self._num_failed} of "
                f"{self.num_questions} verdicts are missing ({rate:.1%}), judge.max_missing_rate "
                f"is {limit:.1%}; for example: {reason}; read the server's log, then lower "
                "judge.concurrency, raise judge.timeout_s or correct the prompt"
            )

    async def wait(self, outage: Outage) -> None:
        """Pause before what failed is asked again, longer each time.

        Raises: JudgeFailed once judge.outage_patience_s passed since the first outage in a row.
        """
        patience = self._settings.outage_patience_s
        now = asyncio.get_running_loop().time()
        gone = [name for name in self._servers if HEART.is_gone(name)]
        if gone:
            raise JudgeFailed(f"server {gone[0]} cannot be started anew; {outage}") from None
        if not self._pauses:
            self._give_up_at = now + patience
        if now >= self._give_up_at:
            waited = f"; waited {patience:g} s (judge.outage_patience_s)" if patience else ""
            raise JudgeFailed(f"{outage}{waited}") from None
        pause = min(2.0 ** min(self._pauses, 5), LONGEST_PAUSE_S, self._give_up_at - now)
        log.warning("%s; asking again in %.0f s", outage, pause)
        await asyncio.sleep(pause)
        self._num_outages += 1
        self._pauses += 1
        self._num_failed = self._num_failed_in_a_row = 0
        self._down.clear()
        for check in self._checks.values():
            check.cancel()
        self._checks.clear()  # what comes back may be another model

    def recovered(self) -> None:
        """A round is answered: the next outage is a new one."""
        self._pauses = 0

    def counts(self) -> dict[str, float]:
        """What `Judge.judge_pools` reports beside verdicts and time."""
        return {
            "not_asked": self.num_not_asked,
            "cache_hits": self.num_cache_hits,
            "retries": self.num_retries + sum(c.num_retries for c in self._clients.values()),
            "outages": self._num_outages,
            "paid": self._num_paid,
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "money": self._money,
        }


def tokens_of(reply: Mapping[str, Any], request: Request) -> tuple[int, int]:
    """(prompt tokens, tokens that the model wrote) of an answered request."""
    used = reply.get("usage")
    sent = request.body.get("prompt") or request.body.get("input") or ()
    text = "".join(message["content"] for message in request.body.get("messages", ()))
    guess = len(sent) + len(text) // CHARACTERS_PER_TOKEN  # where the server does not say
    return _count(used, "prompt_tokens") or guess, _count(used, "completion_tokens")


def _is_down(error: Exception) -> bool:
    """Whether a failure is the server's and not the request's."""
    if isinstance(error, RequestFailed):
        return error.status in (0, 408, 429) or error.status >= 500
    return isinstance(error, Outage)


def _count(used: Any, key: str) -> int:
    """Tokens of a reply's `usage`; 0 where the server does not say."""
    value = used.get(key) if isinstance(used, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
