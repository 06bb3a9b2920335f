"""The Prometheus endpoint, scraped over HTTP and read by Prometheus's own parser."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sink_helpers import ODD, recipe

from megatron_sip.metrics import MetricLogger, metric
from megatron_sip.serving.ports import free_port
from megatron_sip.sinks.opening import open_logger
from megatron_sip.sinks.progress import Progress

STALLED_S = 60.0


class Endpoint:
    """A run's logger with its endpoint, and a clock that passes only when told."""

    def __init__(self, run_dir: Path, host: str = "127.0.0.1") -> None:
        port, self.now = free_port(), 1000.0
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = recipe(
            run_dir, "metrics.tensorboard=false", f"metrics.prometheus.port={port}",
            f"metrics.prometheus.host={host}", f"metrics.prometheus.stalled_s={STALLED_S}",
        )  # fmt: skip
        self.progress = Progress(lambda: "judge", clock=lambda: self.now)
        self.logger: MetricLogger = open_logger(config, self.progress, print, after=3)

    def get(self, path: str) -> tuple[int, str, str]:
        """Status, content type and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as reply:
                return reply.status, reply.headers["Content-Type"], reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read().decode()

    def gauges(self, *, step: int) -> dict[str, tuple[str, str, float]]:
        """Name -> type, help, value, once step `step` is shown."""
        deadline = time.monotonic() + 10
        while True:
            status, kind, text = self.get("/metrics")
            assert status == 200 and kind.startswith("text/plain; version=")
            families = list(text_string_to_metric_families(text))
            found = {f.name: (f.type, f.documentation, f.samples[0].value) for f in families}
            if found["megatron_sip_step"][2] == step:
                return found
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def health(self) -> tuple[int, dict[str, object]]:
        status, kind, text = self.get("/health")
        assert kind == "application/json"
        return status, json.loads(text)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path)
    yield made
    made.logger.close()


def test_each_metric_is_a_gauge_with_meaning_and_unit(endpoint: Endpoint) -> None:
    endpoint.logger.log(4, {"loss": 1.5, "reward/chosen": -0.25, "time/rollout_s": 2.0, **ODD})
    found = endpoint.gauges(step=4)
    assert {name: value for name, (_, _, value) in found.items() if math.isfinite(value)} == {
        "megatron_sip_step": 4, "megatron_sip_loss": 1.5, "megatron_sip_reward_chosen": -0.25,
        "megatron_sip_time_rollout_s": 2.0,
    }  # fmt: skip
    assert {kind for kind, _, _ in found.values()} == {"gauge"}
    known = metric("reward/chosen")
    assert found["megatron_sip_reward_chosen"][1] == f"{known.meaning} ({known.unit})"
    assert found["megatron_sip_reward_is_safe"][2] == math.inf
    assert math.isnan(found["megatron_sip_grad_norm"][2])


def test_a_metric_keeps_its_last_value_until_the_next(endpoint: Endpoint) -> None:
    endpoint.logger.log(4, {"loss": 1.0, "eval/win_rate": 0.5})
    endpoint.logger.log(5, {"loss": 2.0})
    found = endpoint.gauges(step=5)
    assert (found["megatron_sip_loss"][2], found["megatron_sip_eval_win_rate"][2]) == (2.0, 0.5)


def test_health_answers_for_monitors(endpoint: Endpoint) -> None:
    state = {"status": "running", "step": 3, "phase": "judge", "seconds_since_last_step": 0.0}
    assert endpoint.health() == (200, state)  # from the start on; the run goes on from step 3
    endpoint.now += STALLED_S + 1
    stalled = {"status": "stalled", "seconds_since_last_step": STALLED_S + 1}
    assert endpoint.health() == (503, state | stalled)
    endpoint.logger.log(4, {"loss": 1.0})
    assert endpoint.health() == (200, state | {"step": 4})
    with pytest.raises(RuntimeError), endpoint.progress:
        raise RuntimeError
    assert endpoint.health() == (503, state | {"step": 4, "status": "failed"})


def test_other_paths_are_not_there_and_the_end_frees_the_port(endpoint: Endpoint) -> None:
    status, _, text = endpoint.get("/metric")
    assert status == 404 and "/metrics and /health" in text
    endpoint.logger.close()
    with pytest.raises(urllib.error.URLError, match="refused"):
        endpoint.get("/health")


def test_it_listens_on_ipv6_where_told(tmp_path: Path) -> None:
    try:
        endpoint = Endpoint(tmp_path, host="::1")
    except ValueError as error:
        pytest.skip(f"this host has no IPv6 loopback: {error}")
    assert endpoint.health()[0] == 200
    endpoint.logger.close()
