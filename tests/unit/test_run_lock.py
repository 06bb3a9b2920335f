"""Two launches never write one run directory; what died holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_sip.recipe import load_config
from megatron_sip.run_dir import check_run_dir
from megatron_sip.supervision import restarts, run_lock
from megatron_sip.supervision.run_lock import RunInUse, hold, refuse_held

ROOT = Path(__file__).parents[2]
HOLDER = f"""
import os, signal, subprocess, sys
from pathlib import Path
sys.path.append({str(ROOT)!r})
from megatron_sip.supervision.run_lock import hold
hold(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "60"], close_fds=False).pid
forked = os.fork()
if not forked:
    signal.pause()
print(child, forked, flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder, as rank 0 does, and two children of it that outlive it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    children = [int(pid) for pid in process.stdout.readline().split()]
    try:
        yield process
        assert len(children) == 2 and all(Path(f"/proc/{pid}").exists() for pid in children)
    finally:
        process.kill()
        process.wait()
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_a_second_launch_is_refused_with_who_is_there_and_gets_it_once_that_is_dead(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    refuse_held(run_dir)
    assert not run_dir.exists()
    with holder(run_dir) as first:
        told = (
            rf"run\.dir .*run is in use: process {first.pid} on {socket.gethostname()} .*"
            r"or name another folder \(--set run\.dir"
        )
        with pytest.raises(RunInUse, match=told):
            refuse_held(run_dir)
        with pytest.raises(RunInUse, match=told):
            hold(run_dir, patience_s=0.2)
        first.kill()
        first.wait()
        os.close(hold(run_dir, patience_s=0.0))  # though children of the dead one still live
    refuse_held(run_dir)
    check_run_dir(run_dir)  # the file of the lock alone is no run


def test_a_dying_process_is_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {first.pid}"])
        begun = time.monotonic()
        os.close(hold(tmp_path))
        assert 0.3 < time.monotonic() - begun < run_lock.PATIENCE_S
        killer.wait()


def test_a_lock_outlives_the_clearing_of_an_attempt_that_came_to_nothing(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    restarts.clear(tmp_path)
    with pytest.raises(RunInUse):
        refuse_held(tmp_path)
    os.close(lock)


def test_the_check_before_the_start_tells_the_run_that_goes_on_and_nothing_of_its_files(
    tmp_path: Path,
) -> None:
    from megatron_sip.preflight import problems

    config = load_config(ROOT / "configs" / "quickstart.toml", (f"run.dir={tmp_path}",))
    lock = hold(tmp_path)
    for resume in (False, True):
        (told,) = [p for p in problems(config, resume=resume) if p.startswith("run.dir")]
        assert "is in use" in told
    assert not [p for p in problems(config, begun=True) if "is in use" in p]  # it may be dying
    os.close(lock)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match=r"file system has no locks \(.*; mount it with them"):
        hold(tmp_path)


GRANDCHILD = """
import os, sys
from pathlib import Path
from megatron_sip.supervision.run_lock import hold
lock = hold(Path(sys.argv[1]))
if os.fork() == 0:  # the lock's number is free here, and another file takes it
    other = os.open(sys.argv[1] + "/other", os.O_WRONLY | os.O_CREAT)
    assert other == lock
    if os.fork() == 0:
        os.write(other, b"there")
        os._exit(0)
    os._exit(os.wait()[1] >> 8)
sys.exit(os.wait()[1] >> 8)
"""


def test_a_child_of_a_child_keeps_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GRANDCHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "other").read_bytes() == b"there"
