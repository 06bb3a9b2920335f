"""Servers go from a killed trainer to the one that torchrun starts anew; fakes stand in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_serving_processes import living, wait_until_gone

from megatron_sip.serving import sessions, watchdog

HERE = Path(__file__).parent
TRAINER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from megatron_sip.config import StartServer
from megatron_sip.serving import fleet as module
from megatron_sip.serving.adoption import Handover
from megatron_sip.supervision.monitor import PeerLost
folder, heir, extra, how = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
def command(settings, *, name, port, **_):
    fake = sys.argv[1] + "/fake_server_process.py"
    return [sys.executable, "-S", fake, str(port), name, extra], {}
module.server_command = command
settings = StartServer(kind="start", model=Path("m"), max_model_len=64, startup_timeout_s=20.0)
fleet = module.Fleet(
    {"judge": settings, "other": settings},
    model_dirs={"judge": folder / "model", "other": folder / "model"}, log_dir=folder,
    platform_kind="cpu", policy=(), weight_transfer="",
    handover=Handover(folder / "live.json", heir),
)
with fleet:
    if how != "starting":
        fleet.wait()
    print(json.dumps({n: s.pid for n, s in fleet._running.items()}), flush=True)
    if how == "lost":
        raise PeerLost("rank 1")
    time.sleep(600)
"""


class Torchrun:
    """Stands for torchrun: a process that lives while trainers come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        self.process = subprocess.Popen(["sleep", "600"])
        self.trainers: list[subprocess.Popen[str]] = []
        self.seen: set[int] = set()

    def trainer(self, *, extra: str = "good", how: str = "stay") -> dict[str, int]:
        """Start a trainer; process ids of its servers once they are up."""
        arguments = [str(HERE), str(self.folder), str(self.process.pid), extra, how]
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, *arguments], stdout=subprocess.PIPE, text=True
        )
        self.trainers.append(trainer)
        assert trainer.stdout is not None
        pids = json.loads(trainer.stdout.readline())
        self.seen |= set(pids.values())
        return pids

    def kill_trainer(self) -> None:
        self.trainers[-1].kill()
        self.trainers[-1].wait()


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Torchrun]:
    found = Torchrun(tmp_path)
    yield found
    found.process.kill()
    found.process.wait()
    for trainer in found.trainers:
        trainer.kill()
        trainer.wait()
        if trainer.stdout is not None:
            trainer.stdout.close()
    wait_until_gone(found.seen, seconds=15)


def waiting_watchdogs(folder: Path) -> list[int]:
    state = json.loads((folder / "live.json").read_text())
    return [pid for pid, start, _ in state["watchdogs"] if sessions.start_time(pid) == start]


def test_the_next_trainer_takes_over_what_a_killed_one_left(torchrun: Torchrun) -> None:
    first = torchrun.trainer()
    (before,) = waiting_watchdogs(torchrun.folder)
    torchrun.kill_trainer()
    time.sleep(1.5)
    assert len(living(first.values())) == 2
    assert torchrun.trainer() == first
    (after,) = waiting_watchdogs(torchrun.folder)
    assert after != before and not living([before])
    torchrun.kill_trainer()
    assert torchrun.trainer() == first  # and again
    os.kill(first["judge"], signal.SIGKILL)
    torchrun.kill_trainer()
    again = torchrun.trainer()
    assert again["other"] == first["other"] and again["judge"] != first["judge"]


def test_a_trainer_that_lost_a_rank_leaves_its_servers(torchrun: Torchrun) -> None:
    first = torchrun.trainer(how="lost")
    assert torchrun.trainers[-1].wait(10) != 0
    assert torchrun.trainer() == first


@pytest.mark.full
def test_a_server_that_would_be_started_otherwise_is_not_kept(torchrun: Torchrun) -> None:
    first = torchrun.trainer()
    torchrun.kill_trainer()
    (torchrun.folder / "model" / "config.json").write_text('{"changed": 1}')
    second = torchrun.trainer()
    assert not set(first.values()) & set(second.values()) and not living(first.values())
    torchrun.kill_trainer()
    third = torchrun.trainer(extra="stubborn")
    assert not set(second.values()) & set(third.values()) and not living(second.values())


def test_servers_that_were_not_up_yet_are_ended(torchrun: Torchrun) -> None:
    first = torchrun.trainer(how="starting")
    torchrun.kill_trainer()
    second = torchrun.trainer()
    assert not set(first.values()) & set(second.values()) and not living(first.values())


def test_without_torchrun_nobody_waits(torchrun: Torchrun) -> None:
    first = torchrun.trainer()
    torchrun.process.kill()
    torchrun.process.wait()
    torchrun.kill_trainer()
    wait_until_gone(first.values(), seconds=15)


def test_a_watchdog_waits_no_longer_than_its_time(monkeypatch: Any) -> None:
    monkeypatch.setattr(watchdog, "HEIR_S", 0.3)
    me = os.getpid()
    begun = time.monotonic()
    assert not watchdog._adopted((me, sessions.start_time(me)))
    assert 0.3 <= time.monotonic() - begun < 3
    assert not watchdog._adopted((0, -1)) and not watchdog._adopted((me, 1))
