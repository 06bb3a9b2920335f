"""Whether a rollout server that others can reach guards its control routes.

vLLM's own key check leaves them open: whoever reaches the port could exchange weights, or call any
method of a worker. A server that a recipe connects to was started by others, so it is asked.
"""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from megatron_sip.config_rules import LOOPBACK
from megatron_sip.serving.health import PROBE_TIMEOUT_S, ServerFailed
from megatron_sip.serving.server import CONTROL_AUTH

HARMLESS = "/get_world_size"  # a control route that only tells


def check_guarded(name: str, url: str) -> None:
    """Ask a server of another host for a control route, without the key.

    Raises: ServerFailed if it is answered, or the server is gone.
    """
    parts = urlsplit(url)
    if parts.hostname in LOOPBACK:
        return
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", HARMLESS)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise ServerFailed(name, reason=f"GET {url}{HARMLESS}: {error}") from None
    finally:
        connection.close()
    if status not in (401, 403, 404):  # 404: it has no such routes
        raise ServerFailed(
            name,
            reason=f"{url}{HARMLESS} answers without a key (status {status}), so that everyone who "
            f"reaches it may change its weights; start it with --middleware {CONTROL_AUTH} and "
            "VLLM_API_KEY, or let the run start it",
        )
