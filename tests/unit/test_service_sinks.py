"""Weights & Biases offline and MLflow in a local store: what they hold after a run resumed."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from sink_helpers import EXPECTED, killed_and_resumed, log_steps, recipe

from megatron_sip.sinks.opening import open_logger
from megatron_sip.sinks.progress import Progress
from megatron_sip.sinks.run_ids import read_id


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch) -> str:
    """URI of an MLflow store in a folder; the client alone can do no other without a server."""
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (extra sinks)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlruns"


def with_mlflow(tmp_path: Path, uri: str) -> Any:
    return recipe(
        tmp_path / "run", "metrics.tensorboard=false",
        f'metrics.mlflow={{tracking_uri="{uri}", experiment="e"}}',
    )  # fmt: skip


def mlflow_run(config: Any) -> tuple[Any, Any]:
    """Client and the run."""
    from mlflow.tracking import MlflowClient

    settings = config.metrics.mlflow
    client: Any = MlflowClient(tracking_uri=settings.tracking_uri)
    place = f"mlflow {settings.tracking_uri} e"
    return client, client.get_run(read_id(config.run.dir, place))


def test_mlflow_has_each_step_once_in_one_run(tmp_path: Path, mlflow_store: str) -> None:
    config = with_mlflow(tmp_path, mlflow_store)
    config.run.dir.mkdir()
    killed_and_resumed(config)
    client, run = mlflow_run(config)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(p.step, p.value) for p in history] == list(EXPECTED.items())
    assert set(run.data.metrics) == {"loss"}  # NaN and infinity were left out
    assert run.data.params["optimizer.lr"] == "0.00015" and len(run.data.params) > 60
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    found = client.search_runs([run.info.experiment_id])
    assert [r.info.run_id for r in found] == [run.info.run_id]


def test_mlflow_is_told_of_a_failure(tmp_path: Path, mlflow_store: str) -> None:
    config = with_mlflow(tmp_path, mlflow_store)
    config.run.dir.mkdir()
    progress = Progress(str)
    with (
        pytest.raises(RuntimeError),
        open_logger(config, progress, print, after=0) as logger,
        progress,
    ):
        logger.log(1, {"loss": 1.0})
        raise RuntimeError
    assert mlflow_run(config)[1].info.status == "FAILED"


def test_an_mlflow_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (extra sinks)")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = with_mlflow(tmp_path, "http://127.0.0.1:9")
    config.run.dir.mkdir()
    with pytest.raises(ValueError, match=r"metrics.mlflow: http://127.0.0.1:9 did not take") as e:
        log_steps(config, range(1, 2))
    assert "look at metrics.mlflow.tracking_uri" in str(e.value)


def with_wandb(tmp_path: Path) -> Any:
    config = recipe(
        tmp_path / "run", "metrics.tensorboard=false",
        'metrics.wandb={project="p", mode="offline"}',
    )  # fmt: skip
    config.run.dir.mkdir()
    return config


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """History rows of one offline file: LevelDB's log format after seven bytes, one block."""
    from wandb.proto import wandb_internal_pb2

    data, place, rows = path.read_bytes(), 7, []
    assert data.startswith(b":W&B") and len(data) < 2**15
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1  # a whole record
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def test_wandb_has_each_step_once_under_one_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra sinks)")
    config = with_wandb(tmp_path)
    killed_and_resumed(config)
    files = sorted(config.run.dir.glob("wandb/offline-run-*/*.wandb"))
    run_id = read_id(config.run.dir, "wandb /p")
    assert run_id and run_id.startswith("run-")
    assert {f.name for f in files} == {f"run-{run_id}.wandb"} and len(files) == 2
    rows = [row for file in files for row in wandb_rows(file)]
    assert {row["_step"]: row["loss"] for row in rows} == EXPECTED
    assert len(rows) == len(EXPECTED)
    assert math.isnan(rows[1]["grad_norm"]) and rows[1]["reward/is-safe"] == math.inf
