"""The recipe's [metrics] section: who is told of each step besides metrics.jsonl.

Keys of services come from the environment (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN, ...), never from
the recipe.
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import field_validator

from megatron_sip.config_base import Port, Positive, Section


class Wandb(Section):
    """Weights & Biases."""

    project: str
    entity: str | None = None
    """User or team; None: the default of the key's owner."""
    mode: Literal["online", "offline"] = "online"
    """offline: write to run.dir/wandb alone, for `wandb sync --append` later."""


class Mlflow(Section):
    """An MLflow tracking server."""

    tracking_uri: str
    """http(s)://host:port, or another URI that MLflow knows, without user or password."""
    experiment: str
    """Made if it is not there."""

    @field_validator("tracking_uri")
    @classmethod
    def _no_secret(cls, uri: str) -> str:
        if "@" in urlsplit(uri).netloc:
            raise ValueError(
                "metrics.mlflow.tracking_uri carries a user name or password, which would be saved "
                "with the run; put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


class Prometheus(Section):
    """An HTTP endpoint of rank 0 with /metrics and /health; there is no password."""

    port: Port
    host: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" lets everyone who reaches the port read."""
    stalled_s: Positive = 1800.0
    """/health answers 503 when no step ended for so long; above the longest evaluation."""


class Metrics(Section):
    """All of it may change when a run is resumed."""

    tensorboard: bool = True
    """Write run.dir/tensorboard."""
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None
    prometheus: Prometheus | None = None
    peak_tflops: Positive | None = None
    """Peak of one trainer device in the dtype trained with, dense, for model/mfu; None: known for
    an H100 SXM, else there is no MFU."""
