"""A real run with TensorBoard, Prometheus and W&B: scraped while it goes on, killed, resumed."""

import importlib.util
import json
import signal
import socket
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import NTP, free_port

STEPS, INTERVAL, PEAK_TFLOPS = 60, 4, 0.1
WANDB = importlib.util.find_spec("wandb") is not None


def get(port, path):
    """Status and body; (0, "") while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""


def until_step(run, port, step):
    """Answers of /health and /metrics once the run is past a step."""
    deadline = time.monotonic() + 240
    while True:
        status, text = get(port, "/health")
        health = json.loads(text) if status else {"step": -1}
        if health["step"] >= step:
            return status, health, get(port, "/metrics")[1]
        assert run.process.poll() is None and time.monotonic() < deadline, run.stderr()
        time.sleep(0.02)


def scalars(run, name):
    events = EventAccumulator(str(run.run_dir / "tensorboard"), size_guidance={"scalars": 0})
    return [(event.step, event.value) for event in events.Reload().Scalars(name)]


def last_lines(run):
    return {line["step"]: line for line in run.metrics()}


@pytest.fixture(scope="module")
def watched(workplace, launch):
    """A run that was scraped, killed and resumed, with what was scraped."""
    port = free_port()
    metrics = {"prometheus": {"port": port}, "peak_tflops": PEAK_TFLOPS}
    metrics |= {"wandb": {"project": "p", "mode": "offline"}} if WANDB else {}
    recipe = workplace.recipe(
        NTP, "watched", run__steps=STEPS, checkpoint__interval=INTERVAL, metrics=metrics
    )
    run = launch(recipe)
    first = until_step(run, port, INTERVAL + 1)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(30)
    run.assert_nothing_left(within_s=15)
    run = launch(recipe, "--resume")
    second = until_step(run, port, INTERVAL)
    run.wait()
    assert run.process.returncode == 0, run.stderr()
    run.assert_nothing_left(within_s=15)
    return run, first, second


def test_monitors_see_the_run_while_it_goes_on(watched):
    run, first, second = watched
    for status, health, text in (first, second):
        assert status == 200 and health["status"] == "running"
        assert 0 <= health["seconds_since_last_step"] < 60
        gauges = {f.name: f.samples[0].value for f in text_string_to_metric_families(text)}
        assert gauges["megatron_sip_step"] >= 0
    step = int(gauges["megatron_sip_step"])
    if "megatron_sip_loss" in gauges:  # else the scrape came before the first step of the rest
        assert gauges["megatron_sip_loss"] == last_lines(run)[step]["loss"]


def test_tensorboard_holds_what_metrics_jsonl_holds(watched):
    run, _, _ = watched
    lines = last_lines(run)
    assert sorted(lines) == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "model/flops", "time/step_s"):
        expected = [(step, pytest.approx(lines[step][name], rel=1e-6)) for step in sorted(lines)]
        assert scalars(run, name) == expected


@pytest.mark.skipif(not WANDB, reason="wandb is not installed (extra sinks)")
def test_both_parts_are_one_wandb_run(watched):  # that its process is gone, too: `watched`
    run, _, _ = watched
    (run_id,) = json.loads((run.run_dir / "sinks.json").read_text()).values()
    files = list((run.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert [f.name for f in files] == [f"run-{run_id}.wandb"] * 2


def test_utilisation_follows_from_flops_and_time(watched):
    run, _, _ = watched
    for line in run.metrics():
        expected = line["model/flops"] / (line["time/step_s"] * 2 * PEAK_TFLOPS * 1e12)
        assert line["model/mfu"] == pytest.approx(expected) and 0 < expected < 1
        assert line["model/train_mfu"] > line["model/mfu"]
        assert line["cost/device_s"] == 2 * line["time/step_s"]


def test_a_port_in_use_stops_the_run_before_it_begins(workplace, launch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        recipe = workplace.recipe(NTP, "port-in-use", metrics={"prometheus": {"port": port}})
        run = launch(recipe, torchrun=False).wait(120)
    assert run.process.returncode == 1
    assert f"metrics.prometheus: cannot listen on host 127.0.0.1 port {port}" in run.stderr()
    assert not run.run_dir.exists()
