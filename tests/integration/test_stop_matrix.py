"""Ended in every way, at a step and inside a save, then resumed: as if nothing had happened.

A next-token run must equal one in one go, a SIP run one that was given the same pools: weights,
optimizer and train state byte for byte, and all metrics. On demand (`make test-full`);
`test_resume_run.py` runs a few of these ways always.
"""

import os
import signal

import psutil
import pytest
from test_kills import rank, server
from test_resume_run import last_checkpoint, learned, wait_for
from tiny_run import NTP, SIP

pytestmark = pytest.mark.kills

NTP_STEPS, NTP_INTERVAL = 40, 4
SIP_STEPS, SIP_INTERVAL = 6, 2
WAYS = {  # how a run ends
    "sigterm": lambda run: run.process.send_signal(signal.SIGTERM),
    "ctrl-c": lambda run: os.killpg(run.process.pid, signal.SIGINT),  # as a terminal does
    "kill-rank": lambda run: rank(run, 1).kill(),
    "kill-torchrun": lambda run: psutil.Process(run.process.pid).kill(),
    "kill-server": lambda run: server(run, "judge").kill(),
}


def is_saving(run):
    """A checkpoint is being written: its folder is there, its manifest is not."""
    folders = (run.run_dir / "checkpoints").glob("step_*")
    return any(not (folder / "manifest.json").exists() for folder in folders)


def end(run, way, moment, *, interval):
    """Wait for the moment, end the run, and see that it stopped whole."""
    latest = run.run_dir / "checkpoints" / "latest"
    wait_for(run, lambda: len(run.metrics()) > interval and latest.exists())  # there is a way back
    if moment != "step":
        wait_for(run, lambda: is_saving(run), every_s=0.002)
    WAYS[way](run)
    run.process.wait(120)
    assert run.process.returncode != 0
    run.assert_nothing_left(within_s=20)
    assert not (run.run_dir / "summary.json").exists()


@pytest.fixture(scope="module")
def undisturbed(workplace, launch):
    changes = {"run__steps": NTP_STEPS, "checkpoint__interval": NTP_INTERVAL}
    run = launch(workplace.recipe(NTP, "undisturbed", **changes)).wait()
    assert run.process.returncode == 0, run.stderr()
    return run


@pytest.mark.parametrize("moment", ["step", "save", "overlapped save"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "kill-server"])
def test_next_token_pretraining(way, moment, workplace, launch, undisturbed):
    changes = {
        "run__steps": NTP_STEPS,
        "checkpoint__interval": NTP_INTERVAL,
        "checkpoint__asynchronous": moment == "overlapped save",
    }
    recipe = workplace.recipe(NTP, f"ntp-{way}-{moment}".replace(" ", "-"), **changes)
    end(launch(recipe), way, moment, interval=NTP_INTERVAL)
    resumed = launch(recipe, "--resume").wait()
    assert resumed.process.returncode == 0, resumed.stderr()
    assert last_checkpoint(resumed) == last_checkpoint(undisturbed)
    assert learned(resumed) == learned(undisturbed)


@pytest.mark.parametrize(
    ("way", "moment"), [*((way, "step") for way in WAYS), ("kill-torchrun", "save")]
)
def test_self_improving_pretraining(way, moment, workplace, launch, pretrained):
    changes = {
        "model__init": {"kind": "megatron", "path": str(pretrained.run_dir)},
        "run__steps": SIP_STEPS,
        "checkpoint__interval": SIP_INTERVAL,
        "servers__judge__max_restarts": 0,  # else the run goes on by itself: test_chaos.py
    }
    name = f"sip-{way}-{moment}"
    recipe = workplace.recipe(SIP, name, **changes)
    end(launch(recipe), way, moment, interval=SIP_INTERVAL)
    resumed = launch(recipe, "--resume").wait()
    assert resumed.process.returncode == 0, resumed.stderr()
    same = workplace.recipe(SIP, f"{name}-given", **changes)
    given = launch(same, "--pools", str(resumed.run_dir / "pools")).wait()
    assert given.process.returncode == 0, given.stderr()
    assert last_checkpoint(resumed) == last_checkpoint(given)
    assert learned(resumed) == learned(given)
