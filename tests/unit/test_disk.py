"""A run ends before the disk is full, and removes nothing that a resume needs."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_sip import checkpoint_files, disk
from megatron_sip.config import Config
from megatron_sip.pool_store import num_committed
from megatron_sip.recipe import load_config

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.toml"
MIB = 2**20
Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 4, 6, 8, pools of steps 0 to 9, a log."""
    for name in ("checkpoints", "pools", "logs"):
        (tmp_path / name).mkdir()
    for step in (4, 6, 8):
        folder = checkpoint_files.step_folder(tmp_path, step)
        folder.mkdir()
        (folder / "train_state.json").write_text(json.dumps({"reference_version": -1}))
        (folder / "data").write_bytes(b"x" * MIB)
        checkpoint_files.write_manifest(folder, {})
    (tmp_path / "checkpoints" / "latest").write_text("step_00000008")
    for step in range(10):
        (tmp_path / "pools" / f"step_{step:08d}.dp0.parquet").write_bytes(b"x" * 1000)
        (tmp_path / "pools" / f"step_{step:08d}.done").write_text("{}")
    (tmp_path / "logs" / "judge.log").write_bytes(b"old\n" * MIB)
    return tmp_path


def recipe(run_dir: Path, *changes: str) -> Config:
    return load_config(RECIPE, (f"run.dir={run_dir}", f"judge.cache_dir={run_dir}", *changes))


def kept(run_dir: Path) -> list[int]:
    return [int(p.stem[5:]) for p in sorted((run_dir / "pools").glob("*.done"))]


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ((), list(range(10))),
        (("run.keep_pools=1",), [6, 7, 8, 9]),  # the checkpoint of step 6 stays
        (("run.keep_pools=1", "checkpoint.keep_last=1"), [7, 8, 9]),
        (("run.keep_pools=3", "checkpoint.keep_last=1"), [5, 6, 7, 8, 9]),
        (("run.keep_pools=1", "checkpoint.keep_every=4"), [4, 5, 6, 7, 8, 9]),
    ],
)
def test_pools_go_that_no_checkpoint_would_replay(
    run_dir: Path, change: tuple[str, ...], steps: list[int]
) -> None:
    disk.tidy(recipe(run_dir, *change))
    assert kept(run_dir) == steps
    shards = sorted((run_dir / "pools").glob("*.parquet"))
    assert [int(p.name[5:13]) for p in shards] == steps
    oldest, newest = checkpoint_files.steps_saved(run_dir)
    assert newest == 8
    for checkpoint in (oldest, newest):  # what --resume learns again is all there
        assert num_committed(run_dir / "pools", first=checkpoint) == 10


def test_nothing_goes_before_the_first_checkpoint(run_dir: Path) -> None:
    for step in (4, 6, 8):
        shutil.rmtree(checkpoint_files.step_folder(run_dir, step))
    assert checkpoint_files.steps_saved(run_dir) == (0, 0)
    start = checkpoint_files.weights_folder(run_dir, 0)
    start.mkdir()
    checkpoint_files.write_manifest(start, {})
    (run_dir / "checkpoints" / "latest").write_text("weights_00000000")
    disk.tidy(recipe(run_dir, "run.keep_pools=1"))
    assert kept(run_dir) == list(range(10))


def test_a_long_log_begins_anew_and_its_writer_goes_on(run_dir: Path) -> None:
    path = run_dir / "logs" / "trainer.log"
    handler = logging.FileHandler(path)
    handler.emit(logging.makeLogRecord({"msg": "x" * 2 * MIB}))
    disk.tidy(recipe(run_dir, "run.max_log_mib=1"))
    handler.emit(logging.makeLogRecord({"msg": "new"}))
    handler.close()
    assert path.read_text() == "new\n"
    assert (run_dir / "logs" / "trainer.log.1").read_text() == "x" * 2 * MIB + "\n"
    assert (run_dir / "logs" / "judge.log").stat().st_size == 0
    disk.tidy(recipe(run_dir))
    assert path.read_text() == "new\n"


def test_a_quota_counts_what_is_there_and_what_comes(run_dir: Path) -> None:
    held = disk.folder_bytes(run_dir)
    needed = round(1.1 * 20 * MIB) + disk.POOLS * 1002 + disk.MARGIN
    enough = (held + needed + MIB) / 2**30
    assert (
        disk.shortage(recipe(run_dir, f"run.max_gib={enough}"), step=10, checkpoint=20 * MIB) == ""
    )
    less = (held + needed - MIB) / 2**30
    said = disk.shortage(recipe(run_dir, f"run.max_gib={less}"), step=10, checkpoint=20 * MIB)
    assert "run.max_gib" in said and "checkpoint.keep_last or run.keep_pools" in said


def test_a_disk_that_is_nearly_full_is_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    full = {str(cache): 10 * MIB}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, full.get(str(path), 2**40)))
    config = recipe(run_dir, f"judge.cache_dir={cache}")
    assert f"judge.cache_dir {cache}: 0.01 GiB are free" in disk.shortage(
        config, step=10, checkpoint=MIB
    )
    full.clear()
    assert disk.shortage(config, step=10, checkpoint=MIB) == ""
    full[str(run_dir)] = 0
    assert f"run.dir {run_dir}" in disk.shortage(config, step=10, checkpoint=MIB)
