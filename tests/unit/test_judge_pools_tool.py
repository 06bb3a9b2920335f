"""`tools/judge_pools.py` as a command: what it prints, its exit codes, what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_helpers import scripted_server
from rejudge_helpers import GoodnessJudge, judged_run, model_folder, recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "judge_pools.py"), *arguments]


def test_the_tool_prints_a_table_and_ends_with_one_word_on_what_is_wrong(
    tmp_path: Path, model: Path
):
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        run = ["--config", str(path), "--pools", str(tmp_path / "run"), "--logs", str(tmp_path)]
        done = subprocess.run(
            command(*run, "--output", str(tmp_path / "o.parquet"), "--set", "run.seed=5"),
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        wrong = subprocess.run(
            command(*run, "--output", str(tmp_path / "o.txt")),
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert "same best candidate" in done.stdout and "1.000 to 1.000" in done.stdout
    assert "48 known before" in done.stdout and "8 of 8 pools" in done.stderr
    assert wrong.returncode == 1 and wrong.stderr.count("error: ") == 1
    nothing = subprocess.run(
        command("--config", str(path), "--output", "o.parquet"), capture_output=True, text=True
    )
    assert nothing.returncode == 2 and "nothing to judge" in nothing.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_tool_leaves_no_file_not_even_a_hidden_one(
    tmp_path: Path, model: Path, signum: int
):
    server = GoodnessJudge(model)
    with scripted_server(server) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        asked = server.num_asked
        server.before = lambda n: (503, {}, "busy")  # asked again until the deadline
        (tmp_path / "out").mkdir()
        tool = subprocess.Popen(
            command(
                "--config", str(path), "--pools", str(tmp_path / "run"), "--logs", str(tmp_path),
                "--output", str(tmp_path / "out" / "o.parquet"), "--set", "judge.timeout_s=60",
                "--set", "judge.criteria=[{form='likelihood', name='fit', server='judge'}]",
            ),
            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while server.num_asked == asked:
            assert time.monotonic() < deadline and tool.poll() is None, tool.communicate()
            time.sleep(0.05)
        assert list((tmp_path / "out").iterdir())  # it is at work
        tool.send_signal(signum)
        _, stderr = tool.communicate(timeout=30)
    assert tool.returncode == 128 + signum, stderr
    assert not list((tmp_path / "out").iterdir())
