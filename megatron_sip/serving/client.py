"""The HTTP client of every server: bounded concurrency, one deadline, retries of what may heal.

It knows JSON over HTTP and nothing of prompts or weights. Transport errors and status 408, 429
and 5xx are tried again until the deadline; everything else is a typed failure at once.
"""

from __future__ import annotations

import asyncio
import json as jsonlib
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import tenacity

from megatron_sip.errors import RunFailed
from megatron_sip.supervision.heartbeat import HEART

MAX_REPLY_BYTES = 64 * 2**20
REASON_CHARACTERS = 300

T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens and what it must serve.

    Raises: ValueError if the url is not plain http(s)://host[:port].
    """

    name: str  # key of [servers.NAME] in the recipe
    url: str  # http://host:port
    model: str  # model name that requests carry and the server must report
    api_key: str = field(default="", repr=False)  # bearer token; "" for none

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        plain = parts.hostname and not (parts.username or parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not plain or parts.path.strip("/"):
            raise ValueError(
                f"servers.{self.name}: the url must be http://host:port without path or "
                "credentials; put the key in the environment variable of api_key_env"
            )


class RequestFailed(RunFailed):
    """A request that got no usable answer; status 0 means that no HTTP status arrived."""

    def __init__(self, server: str, *, status: int, reason: str) -> None:
        super().__init__(f"server {server}: {reason}")
        self.server = server
        self.status = status
        self.reason = reason


class _Retryable(RequestFailed):
    """A failure that may heal; `wait_s` is what the server asked for."""

    wait_s: float = 0.0


class HttpClient:
    """Requests to one server; an async context manager, bound to the running event loop."""

    def __init__(self, endpoint: Endpoint, *, concurrency: int) -> None:
        """Args: concurrency: requests in flight; the rest wait, outside their deadlines."""
        self.endpoint = endpoint
        self.num_retries = 0
        self._slots = asyncio.Semaphore(concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpClient:
        key = self.endpoint.api_key
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def post(self, path: str, json: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """Send `json`, return the reply's JSON object ({} for an empty body).

        Args:   deadline_s: seconds for all attempts and the waits between them.
        Raises: RequestFailed naming the server, the status and the reason.
        """
        return await self._request("POST", path, json=json, deadline_s=deadline_s)

    async def get(self, path: str, *, deadline_s: float) -> dict[str, Any]:
        """As `post`, without a body."""
        return await self._request("GET", path, json=None, deadline_s=deadline_s)

    async def _request(self, method: str, path: str, *, json: Any, deadline_s: float) -> dict:
        last = "no answer"

        def note(state: tenacity.RetryCallState) -> None:
            nonlocal last
            last = str(getattr(state.outcome and state.outcome.exception(), "reason", last))
            self.num_retries += 1

        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._may_heal),
            wait=_wait,
            stop=tenacity.stop_before_delay(deadline_s),
            before_sleep=note,
            reraise=True,
        )
        async with self._slots:
            try:
                with HEART.waiting_for(self.endpoint.name):
                    async with asyncio.timeout(deadline_s):
                        return await attempts(self._once, method, path, json)
            except TimeoutError:
                reason = f"{path}: deadline of {deadline_s:g} s passed; before that: {last}"
                raise RequestFailed(self.endpoint.name, status=0, reason=reason) from None

    def _may_heal(self, error: BaseException) -> bool:
        """Whether to try again; each attempt that came to an end is a beat."""
        HEART.beat()
        return isinstance(error, _Retryable) and not HEART.is_gone(self.endpoint.name)

    async def _once(self, method: str, path: str, json: Any) -> dict[str, Any]:
        assert self._session is not None, "HttpClient is used outside `async with`"
        url = self.endpoint.url.rstrip("/") + path
        try:
            async with self._session.request(
                method, url, json=json, allow_redirects=False
            ) as response:
                body = await self._read(response, path)
        except (aiohttp.ClientError, OSError) as error:
            reason = self._clean(f"{path}: {type(error).__name__}: {error}")
            raise _Retryable(self.endpoint.name, status=0, reason=reason) from None
        if response.status != 200:
            raise self._failure(response, path=path, body=body)
        try:
            reply = jsonlib.loads(body) if body else {}
        except (ValueError, RecursionError):
            raise self._failed(200, f"{path}: the reply is not JSON") from None
        if not isinstance(reply, dict):
            raise self._failed(200, f"{path}: the reply is not a JSON object")
        return reply

    async def _read(self, response: aiohttp.ClientResponse, path: str) -> bytes:
        body = bytearray()
        async for piece in response.content.iter_chunked(2**16):
            body += piece
            if len(body) > MAX_REPLY_BYTES:
                reason = f"{path}: the reply is longer than {MAX_REPLY_BYTES} bytes"
                raise self._failed(response.status, reason)
        return bytes(body)

    def _failure(self, response: aiohttp.ClientResponse, *, path: str, body: bytes) -> Exception:
        status = response.status
        reason = self._clean(f"{path}: HTTP {status}: {body.decode('utf-8', 'replace')}")
        if status not in (408, 429) and status < 500:
            return self._failed(status, reason)
        failure = _Retryable(self.endpoint.name, status=status, reason=reason)
        after = response.headers.get("Retry-After", "")
        if status in (429, 503) and after.isascii() and after.isdigit():
            failure.wait_s = float(after)
        return failure

    def _failed(self, status: int, reason: str) -> RequestFailed:
        return RequestFailed(self.endpoint.name, status=status, reason=reason)

    def _clean(self, text: str) -> str:
        """`text` without the key, cut short."""
        key = self.endpoint.api_key
        return (text.replace(key, "***") if key else text)[:REASON_CHARACTERS]


_backoff = tenacity.wait_exponential_jitter(initial=0.25, max=20.0, jitter=0.25)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: exponential with jitter, at least what was asked for."""
    error = state.outcome.exception() if state.outcome else None
    return max(_backoff(state), error.wait_s if isinstance(error, _Retryable) else 0.0)


async def run(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; the first exception cancels the others, waits for them and is raised."""
    tasks = [asyncio.ensure_future(item) for item in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def check_served_model(client: HttpClient, expected: str, *, deadline_s: float) -> None:
    """Ask the server what it serves.

    Raises: ValueError if it is another model; RequestFailed if it does not say.
    """
    reply = await client.get("/v1/models", deadline_s=deadline_s)
    entries = reply.get("data")
    entries = entries if isinstance(entries, list) else []
    names = [str(e.get("id")) for e in entries if isinstance(e, dict)]
    if expected not in names:
        served = ", ".join(names) or "nothing"
        raise ValueError(
            f"server {client.endpoint.name} serves {served} but recipe names {expected}; "
            "correct the recipe or start the right server"
        )
