"""A run that reaches its quota ends with a checkpoint, and goes on once there is room."""

import pytest
from test_resume_run import last_checkpoint, learned
from tiny_run import NTP

pytestmark = pytest.mark.full
STEPS = 12


def test_a_run_ends_at_its_quota_with_a_checkpoint_and_goes_on(workplace, launch):
    changes = {"run__steps": STEPS, "checkpoint__interval": 2, "checkpoint__keep_last": 50}
    straight = launch(workplace.recipe(NTP, "no-quota", **changes)).wait()
    assert straight.process.returncode == 0, straight.stderr()
    held = sum(p.stat().st_size for p in straight.run_dir.rglob("*") if p.is_file())
    quota = (held * 0.6 + 2**26) / 2**30
    recipe = workplace.recipe(NTP, "quota", run__max_gib=quota, **changes)
    stopped = launch(recipe).wait()
    assert stopped.process.returncode == 1, stopped.stderr()
    said = next(line for line in stopped.errors() if "run.max_gib" in line)
    assert "stopped after step" in said and "go on with --resume" in said
    step = last_checkpoint(stopped)[1]["step"]
    assert 0 < step < STEPS and f"after step {step}:" in said
    assert sum(p.stat().st_size for p in stopped.run_dir.rglob("*") if p.is_file()) < quota * 2**30
    resumed = launch(recipe, "--resume", "--set", "run.max_gib=100.0").wait()
    assert resumed.process.returncode == 0, resumed.stderr()
    assert last_checkpoint(resumed) == last_checkpoint(straight)
    assert learned(resumed) == learned(straight)
