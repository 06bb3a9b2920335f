"""Bearer-token check on every path of a vLLM server; the standard library only.

vLLM's own key check covers `/v1`, `/v2`, `/inference` and `/cohere`; the control routes (`/pause`,
`/update_weights`, `/collective_rpc`, ...) are open. Give this class to vLLM with
`--middleware megatron_sip.serving.control_auth.ControlAuth`; it runs before vLLM's check. The key
comes from MEGATRON_SIP_CONTROL_KEY or, when that is empty, VLLM_API_KEY. Set both only to the same
value: a request carries one token and must pass both checks.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
REFUSAL = json.dumps({"error": "Unauthorized"}).encode()


class ControlAuth:
    """ASGI middleware: 401 for every request but /health that lacks the bearer token.

    Raises: ValueError at construction if neither environment variable holds a key.
    """

    def __init__(self, app: App) -> None:
        key = os.environ.get("MEGATRON_SIP_CONTROL_KEY") or os.environ.get("VLLM_API_KEY") or ""
        if not key:
            raise ValueError(
                "ControlAuth needs a key: set MEGATRON_SIP_CONTROL_KEY or VLLM_API_KEY"
            )
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan" or scope["path"] in OPEN_PATHS or self._authorized(scope):
            await self._app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "Unauthorized"})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def _authorized(self, scope: Scope) -> bool:
        """Exactly one authorization header, equal to the expected one in constant time."""
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
