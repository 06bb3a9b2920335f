"""Snapshots, the engine as reference and skipped steps, in whole steps, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import run_tasks
import tasks
from workers import Layout, Workers

LAYOUTS = [Layout(dp=2), Layout(tp=2, pp=2)]
SNAPSHOT = {"reference": {"kind": "snapshot", "interval": 3}}
SKIP = {"optimizer": {"nonfinite": "skip", "max_skipped_steps": 2}}


def run(workers: Workers, layout: Layout, folder: Path, changes: Any, *bad: int) -> list[Any]:
    """Each rank of a run in a new folder, its weights NaN-weighted in the `bad` steps."""
    folder.mkdir()
    return workers.run(layout, run_tasks.steps, folder, changes, bad, False)


def resumed(workers: Workers, layout: Layout, folder: Path, changes: Any, *bad: int) -> list[Any]:
    return workers.run(layout, run_tasks.steps, folder, changes, bad, True)


@pytest.mark.parametrize(
    "layout", [pytest.param(LAYOUTS[0], marks=pytest.mark.full), LAYOUTS[1]], ids=str
)
def test_resumed_run_compares_with_the_same_snapshots_bit_for_bit(
    workers: Workers, layout: Layout, tmp_path: Path
) -> None:
    whole = run(workers, layout, tmp_path / "a", SNAPSHOT | {"checkpoint": {"asynchronous": True}})
    run(workers, layout, tmp_path / "b", SNAPSHOT | {"run": {"steps": 4}})
    again = resumed(workers, layout, tmp_path / "b", SNAPSHOT)
    for before, after in zip(whole, again, strict=True):
        assert list(after["steps"]) == [4, 5, 6, 7]
        assert all(found == before["steps"][step] for step, found in after["steps"].items())
        versions = [s["state"].reference_version for s in before["steps"].values()]
        assert versions == [0, 0, 0, 3, 3, 3, 6, 6]
        for step, found in before["steps"].items():
            if versions[step]:
                assert found["reference"] == before["steps"][versions[step] - 1]["weights"]
    kept = ["step_00000008", "weights_00000000", "weights_00000006"]
    assert whole[0]["kept"] == again[0]["kept"] == kept
    margins = [s["metrics"]["objective/margin"] for s in whole[0]["steps"].values()]
    assert [m == 0.0 for m in margins] == [step in (0, 3, 6) for step in range(8)]


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_engine_as_reference_needs_no_model(
    workers: Workers, layout: Layout, tmp_path: Path
) -> None:
    short = {"run": {"steps": 2}}
    found = run(workers, layout, tmp_path / "a", short | {"reference": {"kind": "rollout"}})[0]
    other = run(workers, layout, tmp_path / "b", short)[0]
    flops = [r["steps"][0]["metrics"]["model/flops"] for r in (found, other)]
    forward = flops[1] - flops[0]
    tokens = 2 * cases.NUM_POOLS * tasks.LENGTH  # a pair of rows in each pool
    head = 2 * tokens * cases.tiny_model(tied=False).hidden_size * cases.VOCAB
    assert flops[0] == pytest.approx(3 * forward + head)  # a backward pass is two; the head's again
    assert {s["reference"] for s in found["steps"].values()} == {"engine"}
    assert found["steps"][0]["metrics"]["objective/margin"] != 0
    assert found["kept"] == other["kept"] == ["step_00000002", "weights_00000000"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_step_that_is_not_finite_is_skipped_on_all_ranks_and_changes_no_weight(
    workers: Workers, layout: Layout, tmp_path: Path
) -> None:
    bad = (2, 3, 6)
    ranks = run(workers, layout, tmp_path / "a", SNAPSHOT | SKIP, *bad)
    for whole in ranks:
        seen = whole["steps"]
        assert all(seen[step]["weights"] == seen[step - 1]["weights"] for step in bad)
        assert seen[4]["weights"] != seen[3]["weights"]
        states = [s["state"] for s in seen.values()]
        assert [s.step for s in states] == list(range(1, 9))
        assert [s.consumed_samples for s in states] == [8 * i for i in range(1, 9)]
        assert [s.policy_version for s in states] == [1, 2, 2, 2, 3, 4, 4, 5]
        assert [s.skipped_in_a_row for s in states] == [0, 0, 1, 2, 0, 0, 1, 0]
        assert [s.reference_version for s in states] == [0, 0, 0, 2, 2, 2, 4, 4]
    metrics = [s["metrics"] for s in ranks[0]["steps"].values()]
    assert [m["train/skipped_steps"] for m in metrics] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert ["loss" in m for m in metrics] == [step not in bad for step in range(8)]
    assert all("lr" in m for m in metrics)


@pytest.mark.parametrize("layout", LAYOUTS[:1], ids=str)
def test_too_many_skipped_steps_in_a_row_stop_the_run_also_a_resumed_one(
    workers: Workers, layout: Layout, tmp_path: Path
) -> None:
    bad = (2, 3, 4, 5)
    whole = run(workers, layout, tmp_path / "a", SNAPSHOT | SKIP, *bad)
    again = resumed(workers, layout, tmp_path / "a", SNAPSHOT | SKIP, *bad)
    for found in (*whole, *again):
        assert found["stopped"].startswith("step 5: loss or gradients are not finite")
        assert "the 2 steps before it were skipped" in found["stopped"]
    assert list(whole[0]["steps"]) == [0, 1, 2, 3] and not again[0]["steps"]


def test_a_run_that_may_not_skip_stops_at_once(workers: Workers, tmp_path: Path) -> None:
    for found in run(workers, Layout(dp=2), tmp_path / "a", {}, 1):
        assert found["stopped"].startswith("step 2: loss or gradients are not finite")
