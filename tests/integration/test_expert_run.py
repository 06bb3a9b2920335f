"""A run whose policy has experts, spread over the ranks, and a vLLM server that holds them all."""

import copy

import pytest
from tiny_run import SIP

from megatron_sip.pool_store import read_pools

pytestmark = pytest.mark.full


def test_experts_of_all_ranks_reach_the_server_and_learn(workplace, launch):
    base = copy.deepcopy(SIP)
    base["model"] |= {
        "family": "mixtral",
        "experts": {"num_experts": 4, "experts_per_token": 2},
        "init_std": 0.1,  # experts that differ
    }
    changes = {"evaluation__num_prefixes": 5}  # ranks have unequal shares
    spread = {"parallel__expert_model_parallel_size": 2, **changes}
    runs = [
        launch(workplace.recipe(base, name, **changed)).wait()
        for name, changed in (("together", changes), ("spread", spread))
    ]
    for run in runs:
        assert run.process.returncode == 0, run.stderr()
        run.assert_nothing_left(within_s=15)
        assert len(run.metrics()) == 3
        assert all(line["rollout/logprob_mismatch"] < 1e-4 for line in run.metrics())
    first, other = (
        read_pools(run.run_dir / "pools", 0, dp_rank=0, dp_size=1) for run in runs
    )  # made by the same first weights
    for mine, theirs in zip(first, other, strict=True):
        found, expected = (
            [c.token_ids.tolist() for c in record.pool.candidates] for record in (mine, theirs)
        )
        assert found == expected
    for name in ("loss", "grad_norm"):
        found, expected = (run.metrics()[0][name] for run in runs)
        assert found == pytest.approx(expected, rel=1e-4)
