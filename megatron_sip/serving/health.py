"""Is a server up, and does it serve the model it should? One short blocking probe.

Used while starting, by rank 0 only; requests of a running trainer go through the async client.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
from pathlib import Path
from urllib.parse import urlsplit

from megatron_sip.errors import RunFailed

PROBE_TIMEOUT_S = 2.0
LOG_TAIL_LINES = 30
EXCEPTION = re.compile(r"^(?:.*\] )?((?:\w+\.)*\w+(?:Error|Exception): .*)$", re.MULTILINE)
NOISE = ("nanobind: ", " - leaked ", " - ... skipped remainder")


class ServerFailed(RunFailed):
    """A server did not start, died, or is not the one the recipe names."""

    def __init__(
        self,
        name: str,
        *,
        reason: str,
        exit_code: int | None = None,
        command: list[str] | None = None,
        log_path: Path | None = None,
    ) -> None:
        self.name = name
        self.exit_code = exit_code
        parts = [f'server "{name}": {reason}']
        if command:
            parts.append(f"command: {' '.join(command)}")
        if log_path:
            tail, first = log_tail(log_path), first_error(log_path)
            if first not in tail:  # vLLM ends with "see root cause above"
                parts.append(f"first error in its log: {first}")
            parts.append(f"last lines of {log_path}:\n{tail}")
        super().__init__("\n".join(parts))


class WrongServer(RuntimeError):
    """Something answers, but refuses the key or serves another model."""


def log_tail(path: Path, *, lines: int = LOG_TAIL_LINES) -> str:
    """Last lines of a log file, at most 64 KiB of it; empty if there is none.

    What nanobind says about leaks at every exit is left out: it would push the reason out.
    """
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        read = file.read().decode(errors="replace").splitlines()
    return "\n".join([line for line in read if not line.startswith(NOISE)][-lines:])


def first_error(path: Path) -> str:
    """First line of a log file's first MiB that names a Python exception, "" if none does."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        found = EXCEPTION.search(file.read(2**20).decode(errors="replace"))
    return found[1] if found else ""


def exit_reason(code: int) -> str:
    """Words for a subprocess return code; negative is minus the signal's number."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def probe(url: str, *, model: str, api_key: str) -> str:
    """Ask /health (services other than vLLM have none: 404), then /v1/models, each within 2 s.

    Args:
        url: http(s)://host:port.
        model: model name that the server must list.
        api_key: bearer token; "" sends none.
    Returns: "" if the server is ready, else what it lacks, for a message.
    Raises: WrongServer if it refuses the key or does not list `model`.
    """
    try:
        status, _ = get(url, "/health", api_key)
        if status not in (200, 404):
            return f"GET /health: status {status}"
        status, body = get(url, "/v1/models", api_key)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    if status in (401, 403):
        raise WrongServer(f"{url} refuses the key (GET /v1/models: status {status})")
    if status != 200:
        return f"GET /v1/models: status {status}"
    try:
        served = [entry["id"] for entry in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        raise WrongServer(f"{url}/v1/models is not a model list: {body[:200]!r}") from None
    if model not in served:
        raise WrongServer(f"{url} serves {served}, not {model!r}")
    return ""


def probe_named(name: str, *, url: str, model: str, api_key: str) -> str:
    """`probe` of the recipe's server `name`. Raises: ServerFailed in place of WrongServer."""
    try:
        return probe(url, model=model, api_key=api_key)
    except WrongServer as error:
        raise ServerFailed(name, reason=str(error)) from None


def get(url: str, path: str, api_key: str) -> tuple[int, bytes]:
    """Status and body of one short request. Raises: OSError, HTTPException."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request(
            "GET", path, headers={"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        response = connection.getresponse()
        return response.status, response.read(1 << 20)
    finally:
        connection.close()
