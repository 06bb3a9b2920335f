"""Local servers end when they should, whole, and nothing else does; a fake server stands in."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sip.config import ConnectServer, StartServer
from megatron_sip.serving import fleet as fleet_module
from megatron_sip.serving import sessions
from megatron_sip.serving.fleet import Fleet
from megatron_sip.serving.health import ServerFailed
from megatron_sip.serving.processes import ServerProcess, Watchdog, reserve_port

FAKE = str(Path(__file__).with_name("fake_server_process.py"))

PARENT = """
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_serving_processes import launch, wait_healthy
from megatron_sip.serving.processes import Watchdog
folder = Path(sys.argv[1])
watchdog = Watchdog(log_path=folder / "watchdog.log")
server = launch(folder, watchdog)
wait_healthy(server)
print(watchdog.pid, server.url, server.temp_dir, *server.members(), flush=True)
time.sleep(600)
"""


def launch(folder, watchdog, *, mode="good", serves="judge"):
    """Start a fake server that is expected to serve "judge"."""
    port = reserve_port()
    argv = [sys.executable, "-S", FAKE, str(port.getsockname()[1]), serves, mode]
    log_path = folder / "judge.log"
    return ServerProcess(
        "judge", argv=argv, env={}, port=port, log_path=log_path, watchdog=watchdog
    )


def wait_healthy(server):
    deadline = time.monotonic() + 10
    while not server.healthy():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def living(pids):
    return [pid for pid in pids if sessions.read_process(pid)]


def wait_until_gone(pids, *, seconds=10.0):
    deadline = time.monotonic() + seconds
    while living(pids):
        assert time.monotonic() < deadline, f"still there: {living(pids)}"
        time.sleep(0.02)


def port_is_free(url):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        probe.listen()
    return True


@pytest.fixture
def watchdog(tmp_path):
    helper = Watchdog(log_path=tmp_path / "watchdog.log")
    yield helper
    helper.close()
    assert (tmp_path / "watchdog.log").read_text() == ""


def test_healthy_server_is_stopped_whole_and_leaves_nothing(tmp_path, watchdog):
    server = launch(tmp_path, watchdog)
    wait_healthy(server)
    members = server.members()
    assert len(members) == 2 and server.alive()
    server.stop()
    server.stop()
    assert not living(members) and not server.temp_dir.exists() and port_is_free(server.url)


def test_crash_at_start_shows_command_exit_code_and_last_30_lines(tmp_path, watchdog):
    with pytest.raises(ServerFailed) as caught:
        wait_healthy(launch(tmp_path, watchdog, mode="crash"))
    message = str(caught.value)
    assert 'server "judge": exited with code 3' in message and FAKE in message
    assert "line 49" in message and "line 20" in message and "line 19\n" not in message
    assert caught.value.exit_code == 3 and caught.value.name == "judge"


def test_server_of_another_model_is_refused_and_ended(tmp_path, watchdog):
    server = launch(tmp_path, watchdog, serves="other")
    with pytest.raises(ServerFailed, match=r"serves \['other'\], not 'judge'"):
        wait_healthy(server)
    assert not server.members()


def test_server_that_ignores_sigterm_is_killed_and_its_shared_memory_deleted(tmp_path, watchdog):
    server = launch(tmp_path, watchdog, mode="stubborn")
    wait_healthy(server)
    members = server.members()
    lines = dict(line.split() for line in server.log_path.read_text().splitlines())
    memory = Path("/dev/shm") / lines["memory"]
    assert memory.exists()
    server.stop(grace_s=0.3)
    assert not living(members) and not memory.exists()


def test_stop_leaves_an_unrelated_process_of_the_same_command_alone(tmp_path, watchdog):
    server = launch(tmp_path, watchdog)
    wait_healthy(server)
    with reserve_port() as port:
        argv = [*server.argv[:3], str(port.getsockname()[1]), *server.argv[4:]]
        other = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
        assert other.stdout
        other_pids = [other.pid, int(other.stdout.readline().split()[1])]
        server.stop()
        time.sleep(0.2)
        assert living(other_pids) == other_pids
        for pid in other_pids:
            os.kill(pid, signal.SIGKILL)
        other.communicate()


def test_sigkill_of_the_leader_is_reported_and_ends_its_helper(tmp_path, watchdog):
    server = launch(tmp_path, watchdog)
    wait_healthy(server)
    members = server.members()
    os.kill(server.pid, signal.SIGKILL)
    wait_until_gone([server.pid])
    with pytest.raises(ServerFailed, match='"judge": ended by SIGKILL'):
        server.check()
    assert not living(members) and not server.temp_dir.exists()


def test_sigkill_of_the_helper_is_reported_and_ends_the_leader(tmp_path, watchdog):
    server = launch(tmp_path, watchdog)
    wait_healthy(server)
    (helper,) = set(server.members()) - {server.pid}
    os.kill(helper, signal.SIGKILL)
    wait_until_gone([helper])
    with pytest.raises(ServerFailed, match=f"its helper process {helper} died"):
        server.check()
    assert not living([server.pid])


def test_watchdog_ends_helpers_of_a_dead_leader_though_nobody_checks(tmp_path, watchdog):
    server = launch(tmp_path, watchdog)
    wait_healthy(server)
    members = server.members()
    os.kill(server.pid, signal.SIGKILL)
    wait_until_gone(members)
    server.stop()


def test_sigkill_of_the_trainer_leaves_no_process_no_port_no_folder(tmp_path):
    argv = [sys.executable, "-c", PARENT, str(tmp_path), str(Path(__file__).parent)]
    parent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    watchdog_pid, url, temp_dir, *members = parent.stdout.readline().split()
    pids = [int(watchdog_pid), *map(int, members)]
    assert len(living(pids)) == 3 and Path(temp_dir).is_dir()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pids[0], number)  # the watchdog is deaf to these
    parent.kill()
    parent.communicate()
    wait_until_gone(pids)
    assert port_is_free(url) and not Path(temp_dir).exists()
    assert (tmp_path / "watchdog.log").read_text() == ""


def test_killed_watchdog_is_replaced_and_knows_its_servers(tmp_path, watchdog):
    server = launch(tmp_path, watchdog)
    wait_healthy(server)
    first = watchdog.pid
    os.kill(first, signal.SIGKILL)
    wait_until_gone([first])
    watchdog.ensure()
    assert watchdog.pid != first
    members = server.members()
    watchdog.close()
    assert not living(members) and not server.temp_dir.exists()


def test_watchdog_ends_a_server_that_was_never_registered(tmp_path, watchdog):
    argv = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    env = os.environ | {sessions.TOKEN_VARIABLE: watchdog.token}
    with subprocess.Popen(argv, env=env, start_new_session=True) as server:
        watchdog.close()
        assert server.wait(5) == -signal.SIGTERM


def test_session_of_a_reused_process_number_has_no_members():
    start = sessions.start_time(os.getpid())
    assert sessions.session_members(os.getpid(), start=start - 1) == []


def test_rank_dies_with_its_torchrun():
    rank = "from megatron_sip.lifetime import *; die_with_parent(); import time, os; "
    rank += "print(os.getpid(), flush=True); time.sleep(600)"
    torchrun = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    parent = subprocess.Popen([sys.executable, "-c", torchrun], stdout=subprocess.PIPE)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    wait_until_gone([pid])
    parent.communicate()


def test_fleet_starts_checks_restarts_and_ends_its_servers(tmp_path, monkeypatch):
    def fake_command(settings, *, name, port, **_):
        return [sys.executable, "-S", FAKE, str(port), name], {}

    monkeypatch.setattr(fleet_module, "server_command", fake_command)
    settings = StartServer(kind="start", model=Path("m"), max_model_len=64, startup_timeout_s=10.0)
    options = {"log_dir": tmp_path, "platform_kind": "cpu", "policy": ("policy",)}
    options["weight_transfer"] = "shared_memory"
    dirs = {"policy": tmp_path, "judge": tmp_path}
    with Fleet({"policy": settings, "judge": settings}, model_dirs=dirs, **options) as fleet:
        fleet.wait()
        fleet.check()
        before = fleet.endpoints
        monkeypatch.setenv("OUR_KEY", before["judge"].api_key)
        remote = ConnectServer(
            kind="connect",
            url=before["judge"].url,
            model="judge",
            tokenizer=tmp_path,
            api_key_env="OUR_KEY",
        )
        with Fleet({"remote": remote}, model_dirs={}, **options) as others:
            others.wait()
            assert others.endpoints["remote"] == replace(before["judge"], name="remote")
        fleet.relaunch("policy")
        fleet.wait()
        assert fleet.endpoints["policy"].api_key != before["policy"].api_key
        assert fleet.endpoints["judge"] == before["judge"]
        members = [pid for server in fleet._running.values() for pid in server.members()]
        assert len(members) == 4
        os.kill(fleet._running["judge"].pid, signal.SIGKILL)
        wait_until_gone([fleet._running["judge"].pid])
        with pytest.raises(ServerFailed, match="judge"):
            fleet.check()
    assert not living(members)


def test_server_that_is_late_is_ended_with_its_helper(tmp_path, monkeypatch):
    def hanging(settings, *, name, port, **_):
        return [sys.executable, "-S", FAKE, str(port), name, "hang"], {}

    monkeypatch.setattr(fleet_module, "server_command", hanging)
    settings = StartServer(kind="start", model=Path("m"), max_model_len=64, startup_timeout_s=1.0)
    options = {"log_dir": tmp_path, "platform_kind": "cpu", "policy": (), "weight_transfer": ""}
    with Fleet({"judge": settings}, model_dirs={"judge": tmp_path}, **options) as fleet:
        (server,) = fleet._running.values()
        with pytest.raises(ServerFailed, match="not ready after 1 s"):
            fleet.wait()
        assert not server.members()


def test_a_long_temporary_folder_does_not_make_socket_paths_too_long(
    tmp_path, watchdog, monkeypatch
):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    server = launch(tmp_path, watchdog)
    server.stop()
    assert len(f"{server.temp_dir}/{'u' * 36}") <= 107 and not server.temp_dir.exists()
