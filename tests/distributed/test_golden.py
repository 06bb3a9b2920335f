"""Losses of five steps of each objective, compared with those on file.

A change that should not alter computation leaves them as they are; one that should ships new files
(`MEGATRON_SIP_WRITE_GOLDEN=1 python -m pytest tests/distributed/test_golden.py`) and says so in the
changelog. On the machine that a file names they are equal to the last bit, elsewhere to 3e-5:
Adam's first steps are as large for a gradient that is all rounding as for any other.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import tasks
import torch
from workers import Layout, Workers

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("nll", "rf_nll", "dpo", "dpo_shared", "simpo", "grpo", "grpo_shared")
STEPS = 5


def machine() -> str:
    """What decides the last bits: PyTorch, its kernels, the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"torch {torch.__version__}, {capability}, {platform.machine()}, {min(models, default='')}"
    )


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_on_file(workers: Workers, name: str) -> None:
    losses = workers.run(Layout(), tasks.losses_of_steps, name, STEPS)[0]
    again = workers.run(Layout(), tasks.losses_of_steps, name, STEPS)[0]
    assert losses == again
    assert len(set(losses)) == STEPS  # it learns something
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("MEGATRON_SIP_WRITE_GOLDEN"):
        rows = [f"{step} {loss!r}" for step, loss in enumerate(losses, 1)]
        path.write_text("\n".join([f"# {machine()}", *rows]) + "\n")
    header, *rows = path.read_text().splitlines()
    expected = [float(row.split()[1]) for row in rows]
    if header == f"# {machine()}":
        assert losses == expected
    assert losses == pytest.approx(expected, rel=3e-5)
