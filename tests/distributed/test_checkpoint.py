"""Checkpoints: written beside the training, checked after writing, refused when they hold code."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import checkpoint_tasks
import numpy as np
import pytest
import tasks
import torch
from workers import Layout, Workers

from megatron_sip import checkpoint_files

FIRST, SECOND = Layout(tp=2, dp=2), Layout(pp=2, dp=2)
BEFORE, AFTER = "step_00000001", "step_00000002"


@pytest.fixture(scope="module")
def overlapped(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run directory with one state saved before and while the next two steps were made."""
    run_dir = tmp_path_factory.mktemp("overlapped")
    return run_dir, workers.run(FIRST, checkpoint_tasks.overlapped, run_dir)


def tensor_digests(run_dir: Path, name: str) -> dict[str, str]:
    manifest = json.loads((run_dir / "checkpoints" / name / "manifest.json").read_text())
    return {k: v for k, v in manifest["files"].items() if k.endswith(".distcp")}


def assert_same(found: tasks.Tensors, expected: tasks.Tensors) -> None:
    assert all(found[n].tobytes() == expected[n].tobytes() for n in expected)


def test_what_is_written_is_the_state_at_the_save_whatever_is_learned_meanwhile(
    overlapped: Any,
) -> None:
    run_dir, ranks = overlapped
    assert tensor_digests(run_dir, BEFORE) == tensor_digests(run_dir, AFTER)
    weights = ranks[0]["saved"]
    assert any(np.any(weights[n] != ranks[0]["learned"][n]) for n in weights)


def test_a_checkpoint_is_the_latest_once_all_ranks_have_written(overlapped: Any) -> None:
    for rank in overlapped[1]:
        assert rank["before"] == (BEFORE, False) and rank["after"] == AFTER
    assert any(rank["writing"] for rank in overlapped[1])


def test_an_overlapped_save_goes_on_bit_for_bit_and_in_another_layout(
    workers: Workers, overlapped: Any
) -> None:
    run_dir, ranks = overlapped
    same = workers.run(FIRST, checkpoint_tasks.loaded, run_dir, 2, 2)[0]
    assert_same(same["saved"], ranks[0]["saved"])
    assert_same(same["learned"], ranks[0]["learned"])
    other = workers.run(SECOND, checkpoint_tasks.loaded, run_dir, 2, 2)[0]
    assert_same(other["saved"], ranks[0]["saved"])
    for name, weights in ranks[0]["learned"].items():
        np.testing.assert_allclose(other["learned"][name], weights, atol=2e-5)


@pytest.mark.parametrize(
    ("largest", "said"),
    [(100, "common.pt"), (20_000, "__0_0.distcp: File too large"), (0, "not what was written")],
)
def test_a_checkpoint_that_cannot_be_written_is_named_and_the_one_before_stays(
    workers: Workers, tmp_path: Path, largest: int, said: str
) -> None:
    ranks = workers.run(Layout(tp=2), checkpoint_tasks.full_disk, tmp_path, largest)
    assert said in ranks[0]["error"] and "make room" in ranks[0]["error"]
    for rank in ranks:
        assert str(tmp_path / "checkpoints" / AFTER) in rank["error"]
        assert rank["latest"] == BEFORE
    assert ranks[0]["left"] == ["latest", BEFORE]


class Code:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch ran",)


def torch_saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def put_code(folder: Path, where: str) -> None:
    """Code in a copy of a checkpoint, under a manifest that matches."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    extra = pickle.dumps(Code())
    objects = {
        "object": torch_saved([Code()]),
        "extra state": torch_saved([torch.frombuffer(bytearray(extra), dtype=torch.uint8)]),
    }
    if where == "metadata":
        metadata.planner_data = Code()
    elif where == "common state":
        (folder / "common.pt").write_bytes(torch_saved({"scheduler": Code()}))
    else:
        for index, place in metadata.storage_data.items():
            if "_extra_state" in index.fqn:
                (folder / f"extra-{len(index.fqn)}").write_bytes(objects[where])
                place.relative_path, place.offset = f"extra-{len(index.fqn)}", 0
                place.length = len(objects[where])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    identity = json.loads((folder / "manifest.json").read_text())["model"]
    (folder / "manifest.json").unlink()
    checkpoint_files.write_manifest(folder, identity)


@pytest.mark.parametrize("where", ["metadata", "common state", "object", "extra state"])
def test_code_under_a_manifest_that_matches_is_not_run(
    workers: Workers, overlapped: Any, tmp_path: Path, where: str
) -> None:
    folder = tmp_path / AFTER
    shutil.copytree(overlapped[0] / "checkpoints" / AFTER, folder)
    put_code(folder, where)
    answer = workers.run(Layout(), tasks.load, folder, False, {})[0]
    assert "is not loaded" in answer["error"] and not answer["asked"]
    answer = workers.run(Layout(), checkpoint_tasks.unguarded, folder)[0]
    refusals = {"metadata": "is not loaded", "common state": "Weights only load failed"}
    assert refusals.get(where, "cannot be loaded: it") in answer["error"]
    assert not answer["found"]
    assert not Path("ran").exists()
