"""Sinks: what TensorBoard is told, what is refused beforehand, what a broken sink may not do."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from sink_helpers import EXPECTED, killed_and_resumed, log_steps, recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sip.metrics import METRICS, MetricLogger
from megatron_sip.sinks.check import check_sinks, gauge_name
from megatron_sip.sinks.guarded import GuardedSink
from megatron_sip.sinks.opening import open_logger
from megatron_sip.sinks.progress import Progress
from megatron_sip.sinks.run_ids import keep_id, read_id


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    return [(e.step, e.value) for e in events.Reload().Scalars(name)]


def test_tensorboard_has_each_step_once_also_after_a_kill(tmp_path: Path) -> None:
    killed_and_resumed(recipe(tmp_path))
    assert dict(scalars(tmp_path, "loss")) == EXPECTED
    assert len(scalars(tmp_path, "loss")) == len(EXPECTED)
    ((step, value),) = scalars(tmp_path, "grad_norm")
    assert step == 2 and math.isnan(value)
    assert scalars(tmp_path, "reward/is-safe") == [(2, math.inf)]


def test_steps_that_are_learned_again_without_pools_replace_the_old(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    log_steps(config, range(1, 5))
    log_steps(config, range(3, 5), after=2, shift=0.5)
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]


def test_no_sink_leaves_metrics_jsonl_alone(tmp_path: Path) -> None:
    log_steps(recipe(tmp_path, "metrics.tensorboard=false"), range(1, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_replayed_step_keeps_its_line_and_sinks_get_that_line(tmp_path: Path) -> None:
    seen: list[tuple[int, Mapping[str, float]]] = []

    class Seeing:
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            seen.append((step, metrics))

        def close(self) -> None:
            pass

    with MetricLogger(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": math.nan, "rollout/length": 9.0 * step})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricLogger(tmp_path, after=1) as logger:
        assert logger.last_step == 3
        logger.sinks.append(Seeing())
        logger.log(2, {"loss": 5.0}, replayed=True)
        logger.log(3, {"loss": 6.0})
        logger.log(4, {"loss": 7.0}, replayed=True)  # committed, but the line was never written
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()[3:]
    assert [json.loads(line) for line in written] == [
        {"step": 3, "loss": 6.0}, {"step": 4, "loss": 7.0}
    ]  # fmt: skip
    assert [step for step, _ in seen] == [2, 3, 4]
    assert math.isnan(seen[0][1]["loss"]) and seen[0][1]["rollout/length"] == 18.0
    assert seen[1][1] == {"loss": 6.0}


class Broken:
    """Fails on the steps it is told to, or hangs."""

    def __init__(self, *steps: int, close: bool = False) -> None:
        self.steps, self.closes, self.got = steps, close, []
        self.go_on = threading.Event()
        self.go_on.set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.go_on.wait(30)
        if step in self.steps:
            raise TypeError("nobody expects this")  # no kind that a sink announces
        self.got.append(step)

    def close(self) -> None:
        if self.closes:
            raise OSError("no space left")


def test_a_failing_sink_is_told_once_and_counted_and_goes_on(caplog) -> None:
    told: list[str] = []
    broken = Broken(2, 3)
    sink = GuardedSink("dashboard", broken, told.append)
    for step in (1, 2, 3, 4):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert broken.got == [1, 4] and sink.lost == 2
    first, last = told
    assert "sink dashboard lost step 2 (TypeError: nobody expects this)" in first
    assert last == "sink dashboard lost 2 steps; metrics.jsonl has them"
    assert [r.message for r in caplog.records] == [
        f"sink dashboard lost step {step}: TypeError: nobody expects this" for step in (2, 3)
    ]


def test_a_sink_that_cannot_be_closed_is_told() -> None:
    told: list[str] = []
    GuardedSink("dashboard", Broken(close=True), told.append).close()
    (line,) = told
    assert "dashboard lost its end (OSError: no space left)" in line


def test_a_hanging_sink_delays_neither_a_step_nor_the_end() -> None:
    told: list[str] = []
    broken = Broken()
    broken.go_on.clear()
    sink = GuardedSink("dashboard", broken, told.append, waiting_steps=2, close_s=0.2)
    begun = time.monotonic()
    for step in range(1, 7):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert time.monotonic() - begun < 5
    assert sink.lost >= 3 and "2 steps wait for it already" in told[0]
    assert any("did not end within" in line for line in told)
    broken.go_on.set()


def test_progress_says_how_a_run_does_and_ended() -> None:
    now = [0.0]
    progress = Progress(lambda: "judge", clock=lambda: now[0])
    progress.log(7, {})
    now[0] = 30.0
    expected = {"step": 7, "phase": "judge", "seconds_since_last_step": 30.0}
    assert progress.health(60.0) == (True, {"status": "running", **expected})
    assert progress.health(29.0) == (False, {"status": "stalled", **expected})
    with pytest.raises(RuntimeError), progress:
        raise RuntimeError
    assert progress.health(60.0) == (False, {"status": "failed", **expected})
    with progress:
        pass
    assert progress.health(1.0) == (True, {"status": "finished", **expected})


def test_the_quickstart_has_nothing_against_its_sinks(tmp_path: Path) -> None:
    assert check_sinks(recipe(tmp_path)) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_named_with_its_remedy(tmp_path: Path, host: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = recipe(
            tmp_path, f"metrics.prometheus.port={port}", f"metrics.prometheus.host={host}"
        )
        (problem,) = check_sinks(config)
        assert f"metrics.prometheus: cannot listen on host {host} port {port}" in problem
        assert "set another metrics.prometheus.port" in problem
        with pytest.raises(ValueError, match="cannot listen on"):
            open_logger(config, Progress(str), print, after=0)
    assert check_sinks(config) == []


def test_a_missing_package_is_named_with_key_and_remedy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = recipe(
        tmp_path, 'metrics.wandb={project="p", mode="offline"}', "metrics.prometheus={port=9400}",
        'metrics.mlflow={tracking_uri="http://127.0.0.1:5000", experiment="e"}',
    )  # fmt: skip
    found = check_sinks(config)
    assert [text.split(",")[0] for text in found] == [
        "metrics.tensorboard needs the package tensorboard",
        "metrics.wandb needs the package wandb",
        "metrics.mlflow needs the package mlflow-skinny",
        "metrics.prometheus needs the package prometheus-client",
    ]
    assert all("pip install 'megatron_sip[sinks]'" in text for text in found)
    assert "set metrics.tensorboard = false" in found[0] and "remove metrics.mlflow" in found[2]


def test_online_needs_a_key_of_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = recipe(tmp_path, "metrics.wandb.project=p")
    (problem,) = check_sinks(config)
    assert "set WANDB_API_KEY" in problem and 'metrics.wandb.mode = "offline"' in problem
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert check_sinks(config) == []
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / "netrc").chmod(0o600)
    assert check_sinks(config) == []


def test_criteria_that_would_be_one_gauge_are_refused(tmp_path: Path) -> None:
    criteria = (
        'judge.criteria=[{ form = "likelihood", name = "is-safe", server = "judge" }, '
        '{ form = "novelty", name = "is.safe" }]'
    )
    assert check_sinks(recipe(tmp_path, criteria)) == []
    (problem,) = check_sinks(recipe(tmp_path, criteria, "metrics.prometheus.port=9400"))
    assert "['is-safe', 'is.safe'] are not distinct as Prometheus gauges" in problem
    assert len({gauge_name(name) for name in [*METRICS, "step"]}) == len(METRICS) + 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('metrics.wandb={mode="offline"}', "metrics.wandb.project: required and missing"),
        ('metrics.wandb={project="p", mode="of"}', "metrics.wandb.mode is 'of'"),
        ("metrics.wandb.api_key=x", "metrics.wandb.api_key: unknown key"),
        ("metrics.prometheus.port=70000", "metrics.prometheus.port is 70000"),
        ("metrics.prometheus={}", "metrics.prometheus.port: required and missing"),
        ("metrics.peak_tflops=0.0", "metrics.peak_tflops is 0.0"),
        ("metrics.tensorbord=true", 'did you mean "tensorboard"?'),
        (
            'metrics.mlflow={tracking_uri="https://me:secret@host", experiment="e"}',
            "put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
    ],
)
def test_wrong_settings_are_refused_with_the_key(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe(tmp_path, override)
    assert said in str(error.value)


def test_ids_are_kept_by_place_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert read_id(tmp_path, "wandb /p") is None
    keep_id(tmp_path, "wandb /p", "a")
    keep_id(tmp_path, "mlflow x", "b")
    assert (read_id(tmp_path, "wandb /p"), read_id(tmp_path, "mlflow x")) == ("a", "b")
    assert read_id(tmp_path, "wandb /other") is None
    (tmp_path / "sinks.json").write_text("{")
    with pytest.raises(ValueError, match="json is damaged"):
        read_id(tmp_path, "wandb /p")
