"""Prometheus endpoint of rank 0: /metrics in text format, /health as JSON.

A metric is a gauge named "megatron_sip_" and its name with every other character than letters,
digits and _ turned into _ (reward/chosen: megatron_sip_reward_chosen). It holds its latest value:
eval/* stay until the next evaluation. NaN and infinities are shown as they are.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

from megatron_sip.config_metrics import Prometheus
from megatron_sip.metrics import metric
from megatron_sip.sinks.check import gauge_name, not_free
from megatron_sip.sinks.progress import Progress


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""


class PrometheusSink:
    """The endpoint, on a daemon thread."""

    def __init__(self, settings: Prometheus, progress: Progress) -> None:
        """Raises: ValueError if the address cannot be listened on."""
        self._settings, self._progress = settings, progress
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}  # by metric
        self._step = Gauge(
            gauge_name("step"), "the last step that is done", registry=self._registry
        )
        self._metrics_app = make_wsgi_app(self._registry)
        kind = _Server6 if ":" in settings.host else _Server
        try:
            self._server = make_server(settings.host, settings.port, self._answer, kind, _Silent)
        except OSError as error:
            raise ValueError(not_free(settings, error)) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="prometheus", daemon=True
        )
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name not in self._gauges:
                found = metric(name)
                text = f"{found.meaning} ({found.unit})"
                self._gauges[name] = Gauge(gauge_name(name), text, registry=self._registry)
            self._gauges[name].set(value)
        self._step.set(step)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path in ("/", "/metrics"):
            return self._metrics_app(environ, start)
        if path != "/health":
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics and /health\n"]
        well, state = self._progress.health(self._settings.stalled_s)
        start(
            "200 OK" if well else "503 Service Unavailable",
            [("Content-Type", "application/json"), ("Cache-Control", "no-store")],
        )
        return [json.dumps(state).encode() + b"\n"]
