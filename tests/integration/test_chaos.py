"""SIGKILL for every part of a run in every phase; it comes back by itself and goes on exactly.

`make test-chaos` kills 30 times; CHAOS_KILLS=1000 and CHAOS_SEED=2 ask for more and for others.
`test_resume_run.py` kills three times in every `make test`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from chaos_run import Chaos, assert_equal_to_a_replay, paid_twice, plan
from tiny_run import SERVER, SIP

KILLS = int(os.environ.get("CHAOS_KILLS", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
EVERY = 10


@pytest.mark.chaos
@pytest.mark.timeout(600 + 300 * KILLS)
def test_a_run_comes_back_from_every_kill(workplace: Any, launch: Any, pretrained: Any) -> None:
    steps = EVERY * (KILLS + 2)
    server = {**SERVER, "max_restarts": 10**6}
    changes = {
        "model__init": {"kind": "megatron", "path": str(pretrained.run_dir)},
        "run__steps": steps,
        "checkpoint__interval": 4,
        "servers__judge": {**server, "model": str(workplace.judge)},
        "servers__policy": {**server, "model": "policy", "max_model_len": 64},
    }
    recipe = workplace.recipe(SIP, "chaos", **changes)
    chaos = Chaos(launch, recipe, SEED)
    run = chaos.go(plan(KILLS, every=EVERY, seed=SEED))
    print(f"useful share of time with a kill every {EVERY} steps: {chaos.useful_share():.1%}")
    print(f"{KILLS} kills in {chaos.wall_s:.0f} s:", *sorted(chaos.met.items()), sep="\n")
    assert paid_twice(workplace.folder / "chaos-cache") == []
    same = workplace.recipe(SIP, "chaos-given", **changes)
    assert_equal_to_a_replay(run, launch, same, steps=steps, batch=4)
