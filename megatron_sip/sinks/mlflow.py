"""MLflow: one MLflow run for a run, resumed or not. NaN and infinities are left out.

MLflow keeps both values of a metric that is logged twice at a step: of a step that a resumed run
repeats, the first version stays there and the second is not sent.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sip.config import Config
from megatron_sip.config_metrics import Mlflow
from megatron_sip.recipe import flatten
from megatron_sip.sinks.progress import Progress
from megatron_sip.sinks.run_ids import keep_id, read_id

ALWAYS_LOGGED = "loss"
MAX_PARAMS, MAX_PARAM_LENGTH = 100, 6000  # of one request; of one value
ENVIRONMENT = {  # where it is not set already
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would report its own use
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; by itself MLflow tries for many minutes, and
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # nobody would hear that the server is gone
}
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowSink:
    """All metrics of a step in one request; the recipe as parameters."""

    def __init__(
        self, config: Config, settings: Mlflow, progress: Progress, *, note: Callable[[str], None]
    ) -> None:
        """Raises: ValueError if the tracking server cannot be reached or refuses."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._progress, self._last_step = progress, 0
        place = f"mlflow {settings.tracking_uri} {settings.experiment}"
        run_id = read_id(config.run.dir, place)
        try:
            self._client: Any = MlflowClient(tracking_uri=settings.tracking_uri)
            if run_id is None:
                self._run_id = self._create(config, settings.experiment)
                keep_id(config.run.dir, place, self._run_id)
            else:
                self._run_id = run_id
                self._client.update_run(run_id, status="RUNNING")
                history = self._client.get_metric_history(run_id, ALWAYS_LOGGED)
                self._last_step = max((point.step for point in history), default=0)
        except (MlflowException, OSError) as error:
            raise ValueError(
                f"metrics.mlflow: {settings.tracking_uri} did not take the run ({error}); look at "
                "metrics.mlflow.tracking_uri and at MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN, "
                "or remove [metrics.mlflow]"
            ) from error
        note(f"mlflow: run {self._run_id} in experiment {settings.experiment}")

    def _create(self, config: Config, experiment: str) -> str:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        run_id = self._client.create_run(number, run_name=config.run.dir.resolve().name).info.run_id
        params = [
            Param(key, str(value)[:MAX_PARAM_LENGTH])
            for key, value in flatten(config.model_dump(mode="json")).items()
        ]
        for i in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[i : i + MAX_PARAMS])
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        if step <= self._last_step:
            return
        now = round(1000 * time.time())
        points = [
            Metric(re.sub(r"[^\w./ :-]", "_", name), value, now, step)
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        self._client.log_batch(self._run_id, metrics=points)
        self._last_step = step

    def close(self) -> None:
        self._client.set_terminated(self._run_id, STATUS[self._progress.ended or "failed"])
