"""Whatever is killed while a run learns: soon after, nothing of the run is left.

One run serves one kill, as afterwards it is gone; servers are not started anew here. On demand
(`make test-full`); `test_resume_run.py` kills torchrun, too, in every `make test`.
"""

import signal
import time

import psutil
import pytest
from tiny_run import SIP

WITHIN_S = 20.0
START_S = 400.0


def command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def rank(run, number):
    """The process of a trainer rank, which torchrun started itself."""
    for process in psutil.Process(run.process.pid).children():
        if process.environ().get("RANK") == str(number):
            return process
    raise AssertionError(f"rank {number} is not there")


def server(run, name):
    """The first process of a server, which is no child of torchrun if it was taken over."""
    for process in run.left():
        if f"--served-model-name {name} " in command(process):
            return process
    raise AssertionError(f"server {name} is not there")


def engine_core(run, name):
    found = [p for p in server(run, name).children(recursive=True) if "EngineCore" in command(p)]
    assert len(found) == 1, [command(p) for p in server(run, name).children(recursive=True)]
    return found[0]


VICTIMS = {
    "torchrun": lambda run: psutil.Process(run.process.pid),
    "rank 1": lambda run: rank(run, 1),
    "rank 0": lambda run: rank(run, 0),
    "judge server": lambda run: server(run, "judge"),
    "engine of policy": lambda run: engine_core(run, "policy"),
}


@pytest.fixture
def learning(request, workplace, launch, pretrained):
    """A run that has committed its first step and has thousands to go."""
    name = f"kill-{request.node.callspec.params['victim'].replace(' ', '-')}"
    init = {"kind": "megatron", "path": str(pretrained.run_dir)}
    changes = {"run__steps": 5000, "evaluation__num_prefixes": 2, "model__init": init}
    changes |= {f"servers__{name}__max_restarts": 0 for name in ("judge", "policy")}
    run = launch(workplace.recipe(SIP, name, **changes))
    deadline = time.monotonic() + START_S
    while not run.metrics():
        assert run.process.poll() is None, run.stderr()
        assert time.monotonic() < deadline, run.stderr()
        time.sleep(0.2)
    yield run
    if run.left():
        run.end()


@pytest.mark.kills
@pytest.mark.parametrize("victim", VICTIMS)
def test_nothing_is_left_after_sigkill_of(victim, learning):
    run = learning
    run.look()
    assert len(run.left()) >= 7  # torchrun, 2 ranks, 2 servers with an engine each
    VICTIMS[victim](run).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    run.assert_nothing_left(within_s=WITHIN_S)
    print(f"{victim}: all gone after {time.monotonic() - killed:.1f} s")
    assert run.process.wait(5) != 0
    assert not (run.run_dir / "summary.json").exists()
    for name in ("judge", "policy"):
        if name in victim:
            assert any(f': server "{name}": ' in line for line in run.errors()), run.stderr()
            assert list((run.run_dir / "checkpoints").glob("step_*/manifest.json"))
            log = (run.run_dir / "logs" / "trainer.log").read_text()
            assert f'server "{name}": ' in log
