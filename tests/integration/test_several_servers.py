"""A run whose policy is served by two vLLM servers."""

import copy
import json

import pytest
from tiny_run import SERVER, SIP

from megatron_sip.pool_store import read_pools

pytestmark = pytest.mark.full


def test_two_servers_share_the_prompts_of_a_run(workplace, launch, improved):
    base = copy.deepcopy(SIP)
    base["servers"]["policy_b"] = {**SERVER, "model": "policy", "max_model_len": 64}
    init = {"kind": "megatron", "path": str(improved.run_dir.parent / "ntp")}
    recipe = workplace.recipe(
        base, "two_servers", model__init=init, rollout__server=["policy", "policy_b"]
    )
    run = launch(recipe).wait()
    assert run.process.returncode == 0, run.stderr()
    steps = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    for step in steps:
        for kind in ("rollout", "sync"):
            assert step[f"{kind}/server_s/policy"] > 0 and step[f"{kind}/server_s/policy_b"] > 0
        assert step["rollout/logprob_mismatch"] < 1e-3
    both, alone = (
        read_pools(r.run_dir / "pools", 0, dp_rank=0, dp_size=1) for r in (run, improved)
    )
    assert len(both) == len(alone) == 4
    for mine, theirs in zip(both, alone, strict=True):  # the same weights, seeds and prefixes
        found, expected = (
            [c.token_ids.tolist() for c in record.pool.candidates if c.source == "rollout"]
            for record in (mine, theirs)
        )
        assert found == expected
