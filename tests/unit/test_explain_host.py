"""Pools that lie on the disk at a time, and what does not fit the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sip import checkpoint_files, disk
from megatron_sip.explain.files import pools_at_most
from megatron_sip.explain.host import Host
from megatron_sip.explain.memory import Memory
from megatron_sip.explain.room import Machine, lacks_room
from megatron_sip.recipe import load_config
from megatron_sip.run_dir import create_run_dir

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.toml"
ROOMY = Machine(memory=2**50, disk=2**50, shared=2**50)


def save(run_dir: Path, step: int) -> None:
    folder = checkpoint_files.step_folder(run_dir, step)
    folder.mkdir()
    (folder / "train_state.json").write_text(json.dumps({"reference_version": -1}))
    checkpoint_files.write_manifest(folder, {})
    (run_dir / "checkpoints" / "latest").write_text(folder.name)


@pytest.mark.parametrize(
    ("steps", "interval", "keep_last", "keep_every", "keep_pools", "late", "most"),
    [
        (23, 5, 2, None, None, False, 23),
        (23, 5, 2, None, 1, False, 10),
        (23, 5, 2, None, 1, True, 15),
        (23, 5, 2, None, 7, False, 12),
        (23, 5, 1, None, 3, False, 8),
        (23, 5, 1, None, 3, True, 13),
        (23, 5, 1, 10, 3, False, 13),  # the checkpoint of step 10 keeps what came after it
        (23, 1, 1, None, 2, False, 3),
        (23, 1, 1, None, 2, True, 4),
        (6, 50, 2, None, 1, False, 6),
    ],
)
def test_pools_are_never_more_than_said_and_once_as_many(
    tmp_path: Path, steps: int, interval: int, keep_last: int, keep_every: int | None,
    keep_pools: int | None, late: bool, most: int,
) -> None:  # fmt: skip
    wanted = {"checkpoint.keep_every": keep_every, "run.keep_pools": keep_pools}
    overrides = [f"{key}={value}" for key, value in wanted.items() if value is not None]
    overrides += [f"run.steps={steps}", f"checkpoint.interval={interval}"]
    overrides += [f"checkpoint.keep_last={keep_last}", f"run.dir={tmp_path}"]
    overrides += [f"checkpoint.asynchronous={str(late).lower()}"]
    config = load_config(RECIPE, tuple(overrides))
    create_run_dir(tmp_path, config)
    found, begun = [], []
    for step in range(1, steps + 1):  # as the loop: pools, then a checkpoint, then what goes
        (tmp_path / "pools" / f"step_{step - 1:08d}.done").touch()
        found.append(len(list((tmp_path / "pools").glob("*.done"))))
        if step % interval == 0 or step == steps:
            begun.append(step)
            for done in (
                [*begun[:-1]] if late and step < steps else [*begun]
            ):  # late: before the next one
                save(tmp_path, done)
                disk.tidy(config)
                begun.remove(done)
    assert pools_at_most(config) == max(found) == most


def lacking(machine: Machine, host: Host, *overrides: str) -> tuple[str, ...]:
    config = load_config(RECIPE, ("run.dir=runs/nowhere", *overrides))
    memory = (Memory(0, *[2**20] * 7),)
    plans = servers_of(config)
    return lacks_room(config, machine, memory=memory, host=host, servers=plans, files=())


def servers_of(config):
    from megatron_sip.explain.servers import server_plans
    from megatron_sip.explain.shapes import policy_shape

    return server_plans(config, policy_shape(config.model, vocab_size=4096))


def test_too_little_shared_memory_is_told_before_servers_start() -> None:
    assert lacking(ROOMY, Host(2**20, 0)) == ()
    small = Machine(memory=2**50, disk=2**50, shared=2**20 - 1)
    (told,) = lacking(small, Host(2**20, 0))
    assert "too little shared memory: weights are exchanged through 1.00 MiB in /dev/shm" in told
    assert "lower rollout.bucket_mib" in told
    assert lacking(small, Host(0, 0)) == ()


def test_the_copy_of_a_checkpoint_counts_among_the_memory_of_a_cpu_run() -> None:
    machine = Machine(memory=2**40, disk=2**50, shared=2**50)
    assert lacking(machine, Host(0, 0)) == ()
    (told,) = lacking(machine, Host(0, 2**40))
    assert "copy of a checkpoint being written 1.00 TiB" in told
