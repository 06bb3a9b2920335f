"""What of [metrics] cannot work here, found in no time and before anything starts. No torch."""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
import socket
from urllib.parse import urlsplit

from megatron_sip.config import Config
from megatron_sip.config_metrics import Metrics, Prometheus

PACKAGES = {  # key of [metrics] -> module, package
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "prometheus": ("prometheus_client", "prometheus-client"),
}
WANDB_URL = "https://api.wandb.ai"


def check_sinks(config: Config) -> list[str]:
    """For rank 0's host: one sentence each with key, problem and remedy; empty if all can work.

    Looks for packages and keys, and whether the Prometheus port is free; asks no service.
    """
    settings = config.metrics
    problems = _missing_packages(settings)
    if settings.wandb is not None and settings.wandb.mode == "online" and not _has_wandb_key():
        problems.append(
            'metrics.wandb.mode "online" needs an API key: set WANDB_API_KEY (or run wandb login), '
            'or set metrics.wandb.mode = "offline"'
        )
    if settings.prometheus is not None:
        problems += _port_problem(settings.prometheus) + _same_gauges(config)
    return problems


def gauge_name(name: str) -> str:
    """Prometheus's name of a metric."""
    return "megatron_sip_" + re.sub(r"[^A-Za-z0-9_]", "_", name)


def not_free(settings: Prometheus, error: OSError) -> str:
    """What is wrong when the endpoint's address cannot be listened on."""
    return (
        f"metrics.prometheus: cannot listen on host {settings.host} port {settings.port} "
        f"({error.strerror or error}); set another metrics.prometheus.port or .host, or end what "
        "uses it"
    )


def _missing_packages(settings: Metrics) -> list[str]:
    return [
        f"metrics.{key} needs the package {package}, which is not installed: "
        f"pip install 'megatron_sip[sinks]', or "
        + ("set metrics.tensorboard = false" if key == "tensorboard" else f"remove metrics.{key}")
        for key, (module, package) in PACKAGES.items()
        if getattr(settings, key) and importlib.util.find_spec(module) is None
    ]


def _has_wandb_key() -> bool:
    """Whether W&B will find a key by itself; without one it asks at the terminal, and waits."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_URL)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _port_problem(settings: Prometheus) -> list[str]:
    """Try the address as the endpoint will, and leave it at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        return [not_free(settings, error)]
    return []


def _same_gauges(config: Config) -> list[str]:
    criteria = config.judge.criteria if config.judge else ()
    names = ["chosen", "rejected", *(c.name for c in criteria)]
    gauges = [gauge_name(f"reward/{name}") for name in names]
    if len(set(gauges)) == len(gauges):
        return []
    return [
        f"judge.criteria names {names[2:]} are not distinct as Prometheus gauges, where only "
        "letters, digits and _ count (and chosen and rejected are taken); rename one, or remove "
        "metrics.prometheus"
    ]
