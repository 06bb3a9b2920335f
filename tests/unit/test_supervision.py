"""A rank's record, who brought a job down, reports of waits without end, torchrun's restarts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.supervision import heartbeat, restarts
from megatron_sip.supervision.heartbeat import Heart, Record, culprits, read_record, read_records
from megatron_sip.supervision.monitor import Monitor, PeerLost, gone_peers, last_words
from megatron_sip.supervision.restarts import Launch, launch_of, what_happened, what_is_left


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def heart(tmp_path: Path) -> Iterator[Heart]:
    heart = Heart()
    heart.open(tmp_path, rank=0, attempt=0)
    yield heart
    heart.close()


def write(folder: Path, rank: int, **changes: Any) -> Record:
    """A record of another rank, whose process is this one."""
    mine = Heart().record
    record = replace(mine, rank=rank, **changes)
    path = heartbeat.path_of(folder, rank)
    path.write_text(json.dumps(asdict(record)).ljust(heartbeat.RECORD_BYTES))
    return record


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_record_says_where_the_process_was_when_it_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_sip.supervision.heartbeat import HEART\n"
        "HEART.open(Path(sys.argv[1]), rank=3, attempt=1)\n"
        "HEART.beat(step=12)\n"
        "with HEART.waiting_for('judge'):\n"
        "    HEART.beat(phase='judge'); print(flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    (record,) = read_records(tmp_path, attempt=1)
    assert record.lives and read_records(tmp_path, attempt=0) == []
    process.kill()
    process.communicate()
    (record,) = read_records(tmp_path, attempt=1)
    assert not record.lives and record.ended == ""
    where = f'rank 3 (process {process.pid}) in phase "judge" of step 12, waiting for judge'
    assert str(record) == where


def test_a_long_last_word_still_leaves_a_whole_record(heart: Heart, tmp_path: Path) -> None:
    heart.end("x" * 5000)
    heart.end("and more")
    (record,) = read_records(tmp_path, attempt=0)
    assert record.ended == "x" * heartbeat.LAST_WORDS_CHARACTERS


def test_who_is_gone_without_a_word_brought_the_job_down(tmp_path: Path) -> None:
    killed = write(tmp_path, 1)
    follower = write(tmp_path, 0, ended="lost rank 1 ...")
    failed = write(tmp_path, 2, ended="OSError: no space left")
    assert culprits([follower, killed, failed]) == [killed]
    assert culprits([follower, failed]) == [failed]


def test_a_server_that_went_away_is_gone_until_that_is_accepted(heart: Heart) -> None:
    assert not heart.is_gone("policy")
    heart.see_gone({"policy": 1})
    assert heart.is_gone("policy") and not heart.is_gone("judge")
    heart.accept({"policy": 1})
    heart.see_gone({"policy": 1})  # what another rank reads a second later is old news
    assert not heart.is_gone("policy")
    heart.see_gone({"policy": 2})
    assert heart.is_gone("policy")


def monitor_of(heart: Heart, folder: Path, clock: Clock, said: list[str] | None) -> Monitor:
    say = said.append if said is not None else None
    return Monitor(heart, folder, timeout_s=120, peers=(0, 1), say=say, clock=clock)


def wait(monitor: Monitor, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        monitor.look()


def test_a_wait_is_reported_with_server_phase_and_stacks(
    heart: Heart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    clock = Clock()
    monitor = monitor_of(heart, tmp_path, clock, said)
    heart.beat(step=4, phase="judge")
    with heart.waiting_for("judge-1"):
        wait(monitor, clock, 120)
        assert not said
        wait(monitor, clock, 2)
        assert len(said) == 1
        wait(monitor, clock, 60)
        assert len(said) == 1  # it is not repeated each second
    assert said[0].startswith("no progress for 120 s (run.hang_timeout_s): rank 0 (process")
    assert 'phase "judge" of step 4, waiting for judge-1' in said[0]
    assert "test_a_wait_is_reported_with_server_phase_and_stacks" in caplog.text


def test_the_terminal_names_the_rank_that_does_not_even_write(heart: Heart, tmp_path: Path) -> None:
    said: list[str] = []
    clock = Clock()
    monitor = monitor_of(heart, tmp_path, clock, said)
    frozen = write(tmp_path, 1, step=4, phase="train")
    heart.beat(step=4, phase="train")
    wait(monitor, clock, 125)
    assert str(frozen) in said[0] and "rank 0" not in said[0]


def test_nobody_is_blamed_while_another_rank_goes_on(heart: Heart, tmp_path: Path) -> None:
    said: list[str] = []
    clock = Clock()
    monitor = monitor_of(heart, tmp_path, clock, said)
    for second in range(300):
        write(tmp_path, 1, beats=second, ticks=second, phase="judge")
        wait(monitor, clock, 1)
    assert not said


def test_a_clock_that_jumps_makes_no_report_and_hides_none(
    heart: Heart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    jumps = iter([1e9, -1e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monitor = Monitor(heart, tmp_path, timeout_s=0.3, peers=(), say=said.append)
    for _ in range(10):
        heart.beat()
        monitor.look()
        time.sleep(0.05)
    assert not said
    for _ in range(10):
        monitor.look()
        time.sleep(0.05)
    assert said


def test_a_rank_whose_peer_died_leaves_after_the_grace(heart: Heart, tmp_path: Path) -> None:
    clock = Clock()
    monitor = monitor_of(heart, tmp_path, clock, None)
    dead = write(tmp_path, 1, pid=dead_process())
    assert monitor.lost_peers() == []
    clock.now += 3.5
    assert monitor.lost_peers() == [dead]
    heart.end("on my way")
    assert monitor.lost_peers() == []


def test_a_peer_of_an_earlier_attempt_or_another_host_is_not_missed(
    heart: Heart, tmp_path: Path
) -> None:
    write(tmp_path, 1, pid=dead_process(), attempt=7)
    write(tmp_path, 2, pid=dead_process(), host="elsewhere")
    assert gone_peers(tmp_path, (0, 1, 2), heart.record) == []


def test_a_failure_of_its_own_is_not_blamed_on_others(heart: Heart, tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(RuntimeError, match="out of memory"), last_words(heart, tmp_path, (0, 1)):
        raise RuntimeError("out of memory")
    record = read_record(heartbeat.path_of(tmp_path, 0))
    assert record is not None and record.ended == "RuntimeError: out of memory"


def test_a_lost_connection_is_told_as_the_death_of_the_other_rank(
    heart: Heart, tmp_path: Path
) -> None:
    write(tmp_path, 1, pid=dead_process(), step=3, phase="train")
    said = re.escape("lost rank 1 (process") + '.*in phase "train" of step 3; rank 0 ends, too'
    with pytest.raises(PeerLost, match=said), last_words(heart, tmp_path, (0, 1)):
        raise RuntimeError("Connection closed by peer")
    record = read_record(heartbeat.path_of(tmp_path, 0))
    assert record is not None and record.ended.startswith(heartbeat.FOLLOWED)


TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8",
    "MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "job-7",
    "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3",
}  # fmt: skip


def test_a_launch_is_known_by_its_id_or_by_the_process_of_torchrun() -> None:
    assert launch_of(TORCHRUN) == Launch("job-7", 1, 3, (4, 5, 6, 7))
    alone = launch_of(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"})
    assert f":{os.getppid()}:" in alone.owner


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that launch "mine" began."""
    restarts.claim(tmp_path, Launch("mine", 0, 3, (0,)))
    for name in ("pools", "checkpoints", "logs", "ranks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "config.toml").write_text("")
    return tmp_path


def restarted(attempt: int = 1, owner: str = "mine") -> Launch:
    return Launch(owner, attempt, 3, (0, 1))


def test_only_a_restart_of_the_same_launch_goes_on_by_itself(begun: Path) -> None:
    assert what_is_left(begun, restarted()) == restarts.Left(begun=True)
    assert what_is_left(begun, restarted(attempt=0)) == restarts.Left()
    assert what_is_left(begun, restarted(owner="other")) == restarts.Left()
    (begun / "checkpoints" / "latest").write_text("step_00000004")
    assert what_is_left(begun, restarted()).resumable


def test_a_run_that_failed_for_good_is_not_tried_again(begun: Path) -> None:
    restarts.note_failure(begun, restarted(owner="other"), "not mine")
    restarts.note_failure(begun, restarted(), "judge.limit.money: ...")
    restarts.note_failure(begun, restarted(), "a consequence")
    assert what_is_left(begun, restarted()).failure == "judge.limit.money: ..."
    restarts.claim(begun, restarted(owner="next"))  # a new start with --resume
    assert what_is_left(begun, restarted(owner="next")).failure == ""


def test_an_attempt_without_a_checkpoint_is_cleared_but_for_its_logs(begun: Path) -> None:
    restarts.clear(begun)
    assert sorted(p.name for p in begun.iterdir()) == ["launch.json", "logs", "ranks"]


def test_a_restart_names_the_rank_that_died(begun: Path) -> None:
    (begun / "ranks" / "file").unlink()
    write(begun / "ranks", 0, ended="lost rank 1")
    killed = write(begun / "ranks", 1, step=9, phase="judge")
    assert what_happened(begun, restarted()) == f"restart 1 of 3: {killed} died"
    assert what_happened(begun, restarted(attempt=0)) == ""
