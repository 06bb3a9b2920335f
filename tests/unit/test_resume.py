"""What a resumed run may change and reads back; which checkpoints stay; the wish to stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from pool_helpers import candidate

from megatron_sip import checkpoint_files
from megatron_sip.checkpoint import read_state
from megatron_sip.evaluation.evaluate import PolicyOutput
from megatron_sip.evaluation.saved import load_output, save_output, start_file
from megatron_sip.lifetime import StopRequest
from megatron_sip.recipe import load_config
from megatron_sip.recipe_change import check_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "quickstart.toml"


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run of the quickstart that has a checkpoint and no end."""
    config = load_config(RECIPE, (f"run.dir={tmp_path}",))
    saved = config.model_dump(mode="json", exclude_none=True)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(saved))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000020")
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        "checkpoint.interval=3",
        "data.micro_batch_size=2",
        "judge.concurrency=3",
        "servers.policy.num_threads=2",
        "model.init.path=elsewhere",
        "data.train=moved/sotu_train",
    ],
)
def test_what_does_not_change_the_result_may_change(stopped: Path, change: str) -> None:
    check_recipe(load_config(RECIPE, (f"run.dir={stopped}", change)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.seed=2", "run.seed was 1, is 2"),
        ("run.steps=50", "run.steps was 48, is 50"),
        ("objective.beta=0.2", "objective.beta was 0.1, is 0.2"),
        ("model.num_layers=8", "model.num_layers was 4, is 8"),
        ("rollout.num_rollouts=4", "rollout.num_rollouts was 8, is 4"),
    ],
)
def test_what_changes_the_result_is_refused_by_name(stopped: Path, change: str, said: str) -> None:
    config = load_config(RECIPE, (f"run.dir={stopped}", change))
    with pytest.raises(ValueError, match="set it back, or start a new run") as error:
        check_recipe(config)
    assert said in str(error.value)


def test_a_run_without_checkpoint_or_with_an_end_is_refused(stopped: Path) -> None:
    config = load_config(RECIPE, (f"run.dir={stopped}",))
    (stopped / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="is finished"):
        check_recipe(config)
    (stopped / "summary.json").unlink()
    (stopped / "checkpoints" / "latest").unlink()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        check_recipe(config)
    start = checkpoint_files.weights_folder(stopped, 0)
    start.mkdir()
    checkpoint_files.write_manifest(start, {})
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        check_recipe(config)  # of an older run: weights without a state
    (start / "train_state.json").write_text("{}")
    check_recipe(config)
    (start / "manifest.json").unlink()  # half written
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        check_recipe(config)
    (stopped / "config.toml").unlink()
    with pytest.raises(ValueError, match="holds no run"):
        check_recipe(config)


def test_the_start_policys_evaluation_is_read_back_whole(tmp_path: Path) -> None:
    output = PolicyOutput(
        documents=np.array([4, 4, 9]),
        nll=np.array([1.5, 0.1, 3.25]),
        candidates=(
            (candidate([1, 2, 3]), candidate([4])),
            (candidate([5, 6]), candidate([7])),
            (candidate([8]), candidate([9, 10])),
        ),
        judge=np.array([-1.0, np.nan, -2.5]),
        second=np.array([-0.1, -0.2, -0.3]),
    )
    path = start_file(tmp_path, "test")
    save_output(path, output)
    found = load_output(path)
    for name in ("documents", "nll", "judge", "second"):
        np.testing.assert_array_equal(getattr(found, name), getattr(output, name))
    ids = [[c.token_ids.tolist() for c in of_prefix] for of_prefix in found.candidates]
    assert ids == [[[1, 2, 3], [4]], [[5, 6], [7]], [[8], [9, 10]]]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="restore it from a copy"):
        load_output(path)


def test_next_token_evaluation_has_no_candidates_and_is_read_back(tmp_path: Path) -> None:
    none = np.zeros(0)
    path = start_file(tmp_path, "test")
    save_output(path, PolicyOutput(np.array([1]), np.array([2.0]), (), none, none))
    assert load_output(path).candidates == ()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40, 50):
        folder = checkpoint_files.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"x")
        reference = 10 * (step // 20)  # taken every 20 steps, saved with step 20 first
        state = {"reference_version": reference if step >= 20 else -1}
        (folder / "train_state.json").write_text(json.dumps(state))
        checkpoint_files.write_manifest(folder, {"layers": 2})
    weights = checkpoint_files.weights_folder(tmp_path, 0)
    weights.mkdir()
    checkpoint_files.write_manifest(weights, {})
    (tmp_path / "checkpoints" / "latest").write_text("step_00000050")
    return tmp_path


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir())


def test_old_checkpoints_go_and_the_kept_ones_stay(checkpoints: Path) -> None:
    checkpoint_files.prune(checkpoints, keep_last=2, keep_every=20)
    assert names(checkpoints) == [
        "step_00000020", "step_00000040", "step_00000050", "weights_00000000"
    ]  # fmt: skip
    checkpoint_files.prune(checkpoints, keep_last=1, keep_every=None)
    assert names(checkpoints) == ["step_00000050", "weights_00000000"]


def test_the_one_that_latest_names_stays(checkpoints: Path) -> None:
    (checkpoints / "checkpoints" / "latest").write_text("step_00000010")
    checkpoint_files.prune(checkpoints, keep_last=1, keep_every=None)
    assert names(checkpoints) == ["step_00000010", "step_00000050", "weights_00000000"]


def test_weights_of_a_reference_stay_as_long_as_a_checkpoint_needs_them(checkpoints: Path) -> None:
    for version in (10, 20, 7):
        folder = checkpoint_files.weights_folder(checkpoints, version)
        folder.mkdir()
        checkpoint_files.write_manifest(folder, {})
    checkpoint_files.prune(checkpoints, keep_last=2, keep_every=20)  # 20 and 40, 50
    weights = ["weights_00000000", "weights_00000010", "weights_00000020"]
    assert names(checkpoints)[3:] == weights
    checkpoint_files.prune(checkpoints, keep_last=1, keep_every=None)
    assert names(checkpoints) == ["step_00000050", "weights_00000000", "weights_00000020"]


def test_what_a_killed_save_left_is_removed(checkpoints: Path) -> None:
    (checkpoint_files.step_folder(checkpoints, 50) / "manifest.json").unlink()
    checkpoint_files.remove_incomplete(checkpoints)
    assert "step_00000050" not in names(checkpoints) and len(names(checkpoints)) == 5


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "data").write_bytes(b"y"), "data differs from its manifest"),
        (lambda folder: (folder / "data").unlink(), "files missing or unknown"),
        (lambda folder: (folder / "more").write_bytes(b""), "files missing or unknown"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named(checkpoints: Path, damage, said: str) -> None:
    folder = checkpoint_files.find(checkpoints)
    checkpoint_files.verify(folder, {"layers": 2})
    with pytest.raises(ValueError, match="layers = 2, this recipe has 3"):
        checkpoint_files.verify(folder, {"layers": 3})
    damage(folder)
    with pytest.raises(ValueError, match=said):
        checkpoint_files.verify(folder, {"layers": 2})


def test_a_manifest_of_another_release_is_refused(checkpoints: Path) -> None:
    folder = checkpoint_files.find(checkpoints)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {"schema_version": 9}))
    with pytest.raises(ValueError, match="schema 9, this version reads 1"):
        checkpoint_files.verify(folder, {"layers": 2})


def test_a_state_of_an_older_release_has_defaults_and_one_of_a_newer_is_refused(
    tmp_path: Path,
) -> None:
    old = {"step": 4, "consumed_samples": 8, "policy_version": 4, "stats": {}, "digests": {}}
    path = tmp_path / "train_state.json"
    path.write_text(json.dumps(old))
    assert read_state(tmp_path).spent == {} and read_state(tmp_path).reference_version == -1
    path.write_text(json.dumps(old | {"phase_of_the_moon": 0.5}))
    with pytest.raises(ValueError, match="phase_of_the_moon, which this release does not know"):
        read_state(tmp_path)
    del old["consumed_samples"]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="consumed_samples"):
        read_state(tmp_path)


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as at a terminal, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_a_wish_and_the_second_ends(heard: None) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert request.signum == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_was_ignored_stays_ignored(heard: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == 0
