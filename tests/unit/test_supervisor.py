"""Servers that die are started anew, with a budget; fake servers stand in."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.config import StartServer
from megatron_sip.serving import fleet as fleet_module
from megatron_sip.serving import supervisor as supervisor_module
from megatron_sip.serving import text_fleet as text_fleet_module
from megatron_sip.serving.fleet import Fleet
from megatron_sip.serving.health import ServerFailed
from megatron_sip.serving.supervisor import Supervisor
from megatron_sip.serving.text_fleet import text_fleet
from megatron_sip.supervision.heartbeat import Heart

FAKE = str(Path(__file__).with_name("fake_server_process.py"))
NAMES = ("policy", "judge")


class Run:
    """A fleet of a policy and a judge with its supervisor, whose clock a test moves on."""

    def __init__(self, folder: Path, max_restarts: int) -> None:
        settings = StartServer(
            kind="start", model=Path("m"), max_model_len=64, startup_timeout_s=20.0,
            max_restarts=max_restarts, restart_window_s=1000.0,
        )  # fmt: skip
        self.fleet = Fleet(
            dict.fromkeys(NAMES, settings), model_dirs=dict.fromkeys(NAMES, folder), log_dir=folder,
            platform_kind="cpu", policy=("policy",), weight_transfer="shared_memory",
        )  # fmt: skip
        self.fleet.start()
        self.heart, self.said, self.ahead_s = Heart(), [], 0.0
        self.supervisor = Supervisor(
            self.fleet, policy=("policy",), heart=self.heart, say=self.said.append,
            clock=lambda: time.monotonic() + self.ahead_s,
        )  # fmt: skip

    def pid(self, name: str) -> int:
        return self.fleet._running[name].pid

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 15
        while not ready():
            assert time.monotonic() < deadline, self.supervisor.states
            self.supervisor.look()
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    modes: dict[str, str] = {}

    def fake_command(settings: Any, *, name: str, port: int, **_: Any) -> Any:
        return [sys.executable, "-S", FAKE, str(port), name, modes.get(name, "good")], {}

    monkeypatch.setattr(fleet_module, "server_command", fake_command)
    runs: list[Run] = []

    def make(max_restarts: int = 2, **other_modes: str) -> Run:
        modes.update(other_modes)
        runs.append(Run(tmp_path, max_restarts))
        return runs[-1]

    yield make
    for run in runs:
        run.fleet.close()


def test_a_dead_text_server_comes_back_where_it_was_with_its_key(start: Any) -> None:
    run = start()
    assert run.supervisor.settle() is False
    run.supervisor.exchanged()
    before = run.fleet.endpoints["judge"]
    run.kill("judge")
    run.until(lambda: run.supervisor.states["judge"] == "dead")
    assert run.said == ['server "judge": ended by SIGKILL; started anew in 1 s (1 of 2 restarts)']
    assert run.supervisor.settle() is True and run.supervisor.settle() is False
    assert run.fleet.endpoints["judge"] == before
    assert not run.heart.is_gone("judge") and not run.supervisor.needs_weights()


def test_a_dead_rollout_server_is_stale_until_weights_were_exchanged(start: Any) -> None:
    run = start()
    run.supervisor.settle()
    assert run.supervisor.states == {"policy": "stale", "judge": "serving"}
    run.supervisor.exchanged()
    before = run.fleet.endpoints["policy"]
    run.kill("policy")
    run.until(lambda: run.supervisor.states["policy"] == "dead")
    assert run.heart.is_gone("policy")
    assert run.supervisor.settle() and run.supervisor.needs_weights()
    after = run.fleet.endpoints["policy"]
    assert after.url == before.url and after.api_key != before.api_key
    run.heart.accept(run.supervisor.gone())
    run.supervisor.exchanged()
    assert run.supervisor.states["policy"] == "serving" and not run.heart.is_gone("policy")


def test_a_living_server_whose_weights_are_broken_is_started_anew(start: Any) -> None:
    run = start()
    run.supervisor.settle()
    run.supervisor.exchanged()
    before = run.pid("policy")
    assert run.supervisor.settle(broken=("policy", "elsewhere")) is True
    assert run.pid("policy") != before and run.supervisor.needs_weights()


def test_the_budget_is_of_a_window_and_the_pause_doubles(start: Any) -> None:
    run = start(max_restarts=2)
    run.supervisor.settle()
    for pause in (1, 2):
        run.kill("judge")
        run.until(lambda: run.supervisor.states["judge"] == "dead")
        assert f"in {pause} s" in run.said[-1]
        run.supervisor.settle()
    run.ahead_s += 2000.0  # the window has passed
    run.kill("judge")
    run.until(lambda: run.supervisor.states["judge"] == "dead")
    assert "in 1 s (1 of 2 restarts)" in run.said[-1]


def test_a_server_that_keeps_dying_is_given_up_with_its_log(start: Any) -> None:
    run = start(max_restarts=1)
    run.supervisor.settle()
    run.kill("judge")
    run.until(lambda: run.supervisor.states["judge"] == "dead")
    run.supervisor.settle()
    run.kill("judge")
    with pytest.raises(ServerFailed) as caught:
        run.until(lambda: run.supervisor.states["judge"] == "given up")
        run.supervisor.settle()
    first = str(caught.value).splitlines()[0]
    assert first == 'server "judge": ended by SIGKILL (started anew 1 times within 1000 s)'
    assert "last lines of" in str(caught.value) and "judge.log" in str(caught.value)
    assert run.heart.is_gone("judge")  # nobody need wait for it any more


def test_one_that_never_comes_up_is_tried_once_more_only(start: Any) -> None:
    run = start(max_restarts=5, judge="crash")
    with pytest.raises(ServerFailed, match=r"exited with code 3 \(started anew 1 times"):
        run.supervisor.settle()


def test_a_tools_server_comes_back_and_is_not_waited_for_once_its_restarts_are_spent(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start  # the fake command
    heart, said = Heart(), []
    monkeypatch.setattr(text_fleet_module, "HEART", heart)
    judge = StartServer(kind="start", model=tmp_path, max_model_len=64, max_restarts=1)
    config: Any = SimpleNamespace(servers={"judge": judge}, platform=SimpleNamespace(kind="cpu"))
    with text_fleet(config, ["judge"], log_dir=tmp_path / "logs", say=said.append) as servers:
        fleet = servers._fleet
        before, first = fleet.endpoints["judge"], fleet._running["judge"]
        for again in (1, 0):
            os.kill(fleet._running["judge"].pid, signal.SIGKILL)
            deadline = time.monotonic() + 15
            while not (heart.is_gone("judge") if not again else "1 of 1 restarts" in said[-1]):
                assert time.monotonic() < deadline, said
                time.sleep(0.05)
            while again and (fleet._running["judge"] is first or not fleet.ready("judge", 0.0)):
                assert time.monotonic() < deadline, said
                time.sleep(0.05)
        assert fleet.endpoints["judge"] == before
    assert said[0] == f"starting server judge, log {tmp_path}/logs/judge.log"


@pytest.mark.full
def test_a_living_server_that_answers_no_probe_is_started_anew(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    run.supervisor.settle()
    os.kill(run.pid("judge"), signal.SIGSTOP)
    monkeypatch.setattr(supervisor_module, "UNHEALTHY_S", 0.5)
    monkeypatch.setattr(supervisor_module, "PROBE_EVERY_S", 0.1)
    before = run.pid("judge")
    run.until(lambda: run.pid("judge") != before)
    assert any("not healthy for" in text for text in run.said)
    run.supervisor.settle()
