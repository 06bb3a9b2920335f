"""Stopped, killed and resumed: the same weights, bit for bit, and nothing asked for twice."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from chaos_run import paid_twice
from test_kills import engine_core, rank
from tiny_run import NTP, SIP

from megatron_sip.metrics import metric

STEPS, INTERVAL = 40, 4


def wait_for(run, ready, *, within_s=240.0, every_s=0.02):
    """Until `ready()`; the run must still be going."""
    deadline = time.monotonic() + within_s
    while not ready():
        assert run.process.poll() is None, run.stderr()
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(every_s)


def last_checkpoint(run):
    """{file: digest} of the tensors in a run's last checkpoint, and its train state."""
    root = run.run_dir / "checkpoints"
    folder = root / (root / "latest").read_text()
    digests = json.loads((folder / "manifest.json").read_text())["files"]
    state = json.loads((folder / "train_state.json").read_text())
    return {name: d for name, d in digests.items() if name.endswith(".distcp")}, state


def learned(run):
    """The last line of each step, without what depends on the clock or on who was asked."""
    asked = ("judge/", "rollout/length", "rewrite/", "policy/lag", "pool/dropped", "eval/")
    lines = {line.pop("step"): line for line in run.metrics()}
    return [
        {k: v for k, v in lines[s].items() if not (metric(k).clock or k.startswith(asked))}
        for s in sorted(lines)
    ]


@pytest.fixture(scope="module")
def straight(workplace, launch):
    """Next-token pretraining in one go."""
    recipe = workplace.recipe(NTP, "straight", run__steps=STEPS, checkpoint__interval=INTERVAL)
    run = launch(recipe).wait()
    assert run.process.returncode == 0, run.stderr()
    return run


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.full)]
)
def test_a_run_that_was_ended_and_resumed_equals_one_in_one_go(signum, workplace, launch, straight):
    name = f"ended-{signum.name}"
    recipe = workplace.recipe(NTP, name, run__steps=STEPS, checkpoint__interval=INTERVAL)
    run = launch(recipe)
    wait_for(run, lambda: len(run.metrics()) > INTERVAL)
    ranks = [p for p in run.seen if p.is_running() and "--config" in p.cmdline()]
    run.process.send_signal(signum)
    run.process.wait(90)
    assert run.process.returncode != 0 and ranks
    run.assert_nothing_left(within_s=15)
    saved = last_checkpoint(run)[1]["step"]
    assert INTERVAL <= saved < STEPS
    assert signum == signal.SIGTERM or saved % INTERVAL == 0
    assert not (run.run_dir / "summary.json").exists()
    resumed = launch(recipe, "--resume").wait()
    assert resumed.process.returncode == 0, resumed.stderr()
    assert last_checkpoint(resumed) == last_checkpoint(straight)
    assert learned(resumed) == learned(straight)
    found, expected = (json.loads((r.run_dir / "summary.json").read_text())["eval"]
                       for r in (resumed, straight))  # fmt: skip
    assert found == expected


@pytest.fixture(scope="module")
def killed(workplace, launch, pretrained):
    """A SIP run before its first checkpoint whose rollout engine was killed, then a rank, then
    torchrun: it came back from the first two by itself, and was resumed."""
    init = {"kind": "megatron", "path": str(pretrained.run_dir)}
    recipe = workplace.recipe(
        SIP, "killed", model__init=init, run__steps=5, checkpoint__interval=4,
        checkpoint__keep_last=1, evaluation__interval=2, evaluation__interval_prefixes=4,
        data__validation=workplace.data()["train"],  # the tiny validation split is one document
    )  # fmt: skip
    run = launch(recipe, max_restarts=1)
    pools = run.run_dir / "pools"
    wait_for(run, lambda: (pools / "step_00000000.done").exists(), within_s=400)
    engine_core(run, "policy").kill()
    wait_for(run, lambda: (pools / "step_00000001.done").exists(), within_s=400)
    rank(run, 1).kill()
    wait_for(run, lambda: (pools / "step_00000002.done").exists(), within_s=400)
    said = Path(run.out.name).read_text()
    assert 'server "policy": its helper process ' in said
    assert "restart 1 of 1: rank 1 (process " in said and "died" in said
    assert "error: lost rank 1 (process " in run.stderr()
    run.process.kill()
    run.process.wait(30)
    run.assert_nothing_left(within_s=20)
    assert not (run.run_dir / "checkpoints" / "latest").exists()
    asked = sorted(p.name for p in pools.glob("*.done"))
    before = {p.name: p.read_bytes() for p in pools.glob("step_0000000[012].*")}
    resumed = launch(recipe, "--resume").wait()
    assert resumed.process.returncode == 0, resumed.stderr()
    return resumed, asked, before


def test_committed_pools_are_replayed_and_kept_as_they_are(killed):
    run, asked, before = killed
    assert asked[:3] == [f"step_{i:08d}.done" for i in range(3)]
    for name, data in before.items():
        assert (run.run_dir / "pools" / name).read_bytes() == data
    assert len(list((run.run_dir / "pools").glob("*.done"))) == 5
    log = (run.run_dir / "logs" / "trainer.log").read_text()
    assert log.count("evaluating the start policy on test") == 1
    assert paid_twice(run.run_dir.with_name("killed-cache")) == []


def test_it_was_evaluated_on_the_way_where_it_was_live(killed):
    run, _, _ = killed
    found = {line["step"] for line in run.metrics() if "eval/win_rate" in line}
    assert found == {2, 4}
    line = next(line for line in run.metrics() if line["step"] == 4)
    assert 0 <= line["eval/win_rate_low"] <= line["eval/win_rate"] <= line["eval/win_rate_high"]
    assert line["eval/nll"] > 0 and 0 < line["eval/distinct2"] <= 1


def test_a_resumed_run_equals_one_that_was_given_the_same_pools(
    killed, workplace, launch, pretrained
):
    run, _, _ = killed
    init = {"kind": "megatron", "path": str(pretrained.run_dir)}
    train = workplace.data()["train"]
    recipe = workplace.recipe(
        SIP, "same-pools", model__init=init, run__steps=5, data__validation=train
    )
    given = launch(recipe, "--pools", str(run.run_dir / "pools")).wait()
    assert given.process.returncode == 0, given.stderr()
    assert last_checkpoint(run) == last_checkpoint(given)
    for found, expected in zip(learned(run), learned(given), strict=True):
        assert found == expected
    names = {p.name for p in (run.run_dir / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000005", "weights_00000000"}  # keep_last = 1


def test_a_run_can_go_back_to_an_older_checkpoint_and_save_over_the_newer(
    workplace, launch, straight
):
    recipe = workplace.recipe(NTP, "back", run__steps=STEPS, checkpoint__interval=INTERVAL)
    folder = recipe.with_suffix("")
    shutil.copytree(straight.run_dir, folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "latest").write_text(f"step_{STEPS - INTERVAL:08d}")
    run = launch(recipe, "--resume").wait()
    assert run.process.returncode == 0, run.stderr()
    assert last_checkpoint(run) == last_checkpoint(straight)
    assert learned(run) == learned(straight)


LAYOUTS = {  # name -> (ranks, tensor parallel, pipeline parallel)
    "dp1": (1, 1, 1),
    "dp2": (2, 1, 1),
    "tp2": (2, 2, 1),
    "pp2": (2, 1, 2),
}


def in_layout(workplace, name, layout, **changes):
    ranks, tp, pp = LAYOUTS[layout]
    changes |= {
        "parallel__world_size": ranks,
        "parallel__tensor_model_parallel_size": tp,
        "parallel__pipeline_model_parallel_size": pp,
    }
    return workplace.recipe(NTP, name, **changes), ranks


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tp2", "pp2"),
        pytest.param("dp2", "dp1", marks=pytest.mark.full),
        pytest.param("pp2", "tp2", marks=pytest.mark.full),
    ],
)
def test_a_run_goes_on_at_another_layout_with_the_same_losses(first, second, workplace, launch):
    changes = {"run__steps": 8, "checkpoint__interval": 4}
    recipe, ranks = in_layout(workplace, f"was-{first}", first, **changes)
    straight = launch(recipe, num_ranks=ranks).wait()
    assert straight.process.returncode == 0, straight.stderr()
    recipe, ranks = in_layout(workplace, f"{first}-then-{second}", second, **changes)
    folder = recipe.with_suffix("")
    shutil.copytree(straight.run_dir, folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "latest").write_text("step_00000004")
    run = launch(recipe, "--resume", num_ranks=ranks).wait()
    assert run.process.returncode == 0, run.stderr()
    assert "resumed after step 4" in run.stderr() + Path(run.out.name).read_text()
    for found, expected in zip(run.metrics()[-4:], straight.metrics()[-4:], strict=True):
        assert found["step"] == expected["step"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def refusal(run):
    run.wait(120)
    assert run.process.returncode not in (0, None)
    return run.errors()[0] + run.stderr()


def test_what_may_not_change_is_refused_by_name(workplace, launch, straight):
    recipe = workplace.recipe(NTP, "straight", run__steps=STEPS, checkpoint__interval=INTERVAL)
    (straight.run_dir / "summary.json").rename(straight.run_dir / "summary.was")
    try:
        run = launch(recipe, "--resume", "--set", "optimizer.lr=1e-3", torchrun=False)
        assert "optimizer.lr was 0.002, is 0.001" in refusal(run)
        damaged = straight.run_dir / "checkpoints" / f"step_{STEPS:08d}" / "train_state.json"
        before = damaged.read_bytes()
        damaged.write_bytes(before + b" ")
        message = refusal(launch(recipe, "--resume"))
        assert "train_state.json differs from its manifest" in message
        damaged.write_bytes(before)
    finally:
        (straight.run_dir / "summary.was").rename(straight.run_dir / "summary.json")


def test_a_finished_run_and_a_missing_one_are_not_resumed(workplace, launch, straight):
    finished = workplace.recipe(NTP, "straight", run__steps=STEPS, checkpoint__interval=INTERVAL)
    assert "is finished" in refusal(launch(finished, "--resume", torchrun=False))
    missing = workplace.recipe(NTP, "never-begun")
    assert "holds no run" in refusal(launch(missing, "--resume", torchrun=False))
