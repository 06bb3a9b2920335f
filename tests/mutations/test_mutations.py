"""Each breakage makes its test fail: `make test-mutations`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, table

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.mutations


def broken_copy(mutation: Mutation, folder: Path) -> None:
    """Package and tests in another place, with the breakage."""
    for name in ("megatron_sip", "tests", "tools", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "megatron_sip" / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file}: {mutation.old!r} is not there once"
    path.write_text(text.replace(mutation.old, mutation.new))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_breakage_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    broken_copy(mutation, tmp_path)
    chosen = ["-k", mutation.chosen] if mutation.chosen else []
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            mutation.caught_by,
            *chosen,
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 1, f"status {done.returncode}, not 1:\n{done.stdout}"
    assert "\nFAILED " in done.stdout and "\nERROR " not in done.stdout, done.stdout


def test_docs_have_the_table() -> None:
    assert table() in (ROOT / "docs" / "proofs.md").read_text()
