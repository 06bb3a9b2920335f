"""--explain on the real command line: quick, without ranks, and true of a finished run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROOT, SIP

LIMIT_S = 30
CONNECT = '{ kind = "connect", url = "http://u:pw@localhost", model = "m", tokenizer = "t" }'
RECIPES = ("quickstart", "quickstart_ntp", "continual_quality")


def explain(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run without torchrun; more than `LIMIT_S` is a failure."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", str(ROOT))
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain_sip.py"), "--config", str(recipe), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip


def as_json(recipe: Path, *arguments: str) -> dict[str, Any]:
    done = explain(recipe, "--explain", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_explained_as_text_and_as_json_and_nothing_is_written(
    tmp_path: Path, name: str
) -> None:
    recipe, run_dir = ROOT / "configs" / f"{name}.toml", f"run.dir={tmp_path / 'run'}"
    done = explain(recipe, "--explain", "--set", run_dir)
    assert done.returncode == 0, done.stderr
    sections = ("ranks: ", "parameters: ", "memory of a rank", "a step in stage", "files in")
    assert all(section in done.stdout for section in sections)
    found = as_json(recipe, "--set", run_dir)
    assert sum(found["parameters"]["total"].values()) > 1e6
    assert found["memory"][0]["steady"] > 0 and found["config"]["run"]["dir"] == run_dir[8:]
    assert len(found["ranks"]) == found["config"]["parallel"]["world_size"]
    assert not list(tmp_path.iterdir())


def test_overrides_are_explained_and_files_may_be_missing(tmp_path: Path) -> None:
    recipe, nowhere = ROOT / "configs" / "quickstart.toml", str(tmp_path / "nowhere")
    keys = ("data.tokenizer", "data.train", "servers.judge.model", "model.init.path")
    missing = [part for key in keys for part in ("--set", f"{key}={nowhere}")]
    sizes = ("--set", "parallel.world_size=4", "--set", "data.micro_batch_size=2")
    found = as_json(recipe, *sizes, *missing)
    assert len(found["ranks"]) == 4
    assert found["data"]["vocab_size_assumed"] and found["data"]["train_tokens"] is None
    assert found["servers"][1]["shape"] is None
    assert all(any(key in told for told in found["obstacles"]) for key in keys)
    done = explain(recipe, "--explain", *missing)
    assert "size of the data and passes over it: not known" in done.stdout
    assert "size unknown" in done.stdout and "would stop the run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "--json prints what --explain finds; add --explain"),
        (["--explain", "--pools", "runs/x/pools"], "give one of them"),
        (["--explain", "--resume"], "give one of them"),
    ],
)
def test_flags_that_contradict_are_refused(arguments: list[str], message: str) -> None:
    done = explain(ROOT / "configs" / "quickstart.toml", *arguments)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_wrong_recipe_and_impossible_server_are_one_line(tmp_path: Path) -> None:
    recipe = ROOT / "configs" / "quickstart.toml"
    for override, message in (
        ("run.stepz=1", 'did you mean "steps"?'),
        (f"servers.judge={CONNECT}", "carries a user name or password"),
        ("servers.judge.gpus=[0]", 'servers.judge.gpus is [0], but platform.kind is "cpu"'),
    ):
        done = explain(recipe, "--explain", "--set", override)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_finished_run_wrote_and_asked_about_what_was_said(workplace: Any, improved: Any) -> None:
    begun = time.monotonic()
    found = as_json(workplace.recipe(SIP, "sip-explained"))
    assert time.monotonic() - begun < LIMIT_S and found["obstacles"] == []
    lines = improved.metrics()
    (step,) = found["steps"]
    roles = {role["name"]: role for role in step["roles"]}
    planned = sum(step["work"]["verdicts"].values())
    # the random rewriter writes bytes that are no text: such rewrites leave before judging
    assert all(line["judge/verdicts"] + line["rewrite/dropped"] == planned for line in lines)
    asked = sum(line["judge/verdicts"] - line["judge/cache_hits"] for line in lines)
    judge = roles["judge: likelihood"]
    mean = sum(line["judge/prompt_tokens"] for line in lines) / asked
    assert judge["prompt_tokens"] / judge["requests"] == pytest.approx(mean, rel=0.25)
    files = {f["path"]: f for f in found["files"]}
    (folder,) = (improved.run_dir / "checkpoints").glob("step_*")
    written = sum(p.stat().st_size for p in folder.iterdir())
    assert files["checkpoints/step_*/"]["bytes_each"] == pytest.approx(written, rel=0.1)
    pools = sum(p.stat().st_size for p in (improved.run_dir / "pools").iterdir()) / len(lines)
    assert files["pools/step_*.parquet"]["bytes_each"] == pytest.approx(pools, rel=0.5)
