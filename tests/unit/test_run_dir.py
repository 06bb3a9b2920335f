"""A run directory is never reused, holds the whole recipe and no secret, and tears no file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_sip.config import Config
from megatron_sip.publish import atomic_write
from megatron_sip.recipe import load_config
from megatron_sip.run_dir import create_run_dir, environment, write_summary

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.toml"


def connected(url: str) -> Config:
    server = f'{{ kind = "connect", url = "{url}", model = "m", tokenizer = "t" }}'
    return load_config(RECIPE, (f"servers.judge={server}",))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_saved_recipe_loads_back_equal(tmp_path: Path, recipe: Path) -> None:
    config = load_config(recipe)
    create_run_dir(tmp_path / "a" / "run", config)
    assert load_config(tmp_path / "a" / "run" / "config.toml") == config


def test_saved_recipe_keeps_overrides_and_states_defaults(tmp_path: Path) -> None:
    overrides = ("optimizer.lr=5e-5", "evaluation.seed=7")
    config = load_config(RECIPE, overrides)
    create_run_dir(tmp_path, config)
    assert load_config(tmp_path / "config.toml") == config
    text = (tmp_path / "config.toml").read_text()
    assert "adam_beta2 = 0.95" in text and "\nlr = 5e-05" in text


def test_folders_are_made_in_an_empty_folder(tmp_path: Path) -> None:
    create_run_dir(tmp_path, load_config(RECIPE))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints", "config.toml", "environment.json", "logs", "pools"
    ]  # fmt: skip


def test_used_folder_or_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = load_config(RECIPE)
    (tmp_path / ".hidden").touch()
    with pytest.raises(ValueError, match=r"run\.dir .* holds 1 entries \(\.hidden\).*or remove it"):
        create_run_dir(tmp_path, config)
    assert [p.name for p in tmp_path.iterdir()] == [".hidden"]
    with pytest.raises(ValueError, match="is a file"):
        create_run_dir(tmp_path / ".hidden", config)


def test_second_run_cannot_start_in_the_first_ones_folder(tmp_path: Path) -> None:
    config = load_config(RECIPE)
    create_run_dir(tmp_path, config)
    with pytest.raises(ValueError, match="must be absent or empty"):
        create_run_dir(tmp_path, config)


def test_password_in_a_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"servers\.judge\.url carries") as caught:
        create_run_dir(tmp_path / "run", connected("http://user:hunter2@localhost:8000"))
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    create_run_dir(tmp_path / "run", connected("http://localhost:8000"))


def test_environment_names_versions_and_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIP_TEST_KEY", "hunter2")
    create_run_dir(tmp_path, load_config(RECIPE))
    text = (tmp_path / "environment.json").read_text()
    content = json.loads(text)
    assert content["packages"]["megatron-core"] and content["packages"]["torch"]
    assert content["cpu"]["model"] and content["cpu"]["usable_cores"] >= 1
    assert content["cpu"]["memory_gib"] > 0.1
    assert "hunter2" not in text


def test_environment_does_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git"] is None


def test_summary_is_replaced_and_must_be_valid_json(tmp_path: Path) -> None:
    write_summary(tmp_path, {"steps": 1})
    write_summary(tmp_path, {"steps": 2, "eval": {"win_rate": 0.5}})
    expected = {"steps": 2, "eval": {"win_rate": 0.5}}
    assert json.loads((tmp_path / "summary.json").read_text()) == expected
    with pytest.raises(ValueError, match=r"summary\.json: .*leave the key out"):
        write_summary(tmp_path, {"loss": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text()) == expected


def test_atomic_write_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    replace, fsync = os.replace, os.fsync

    def spy_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        calls.append("replace")
        replace(source, target)

    def spy_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    atomic_write(tmp_path / "a", b"new")
    assert calls == ["file", "replace", "folder"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_failed_atomic_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write(tmp_path / "a", b"old")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "a", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
