"""A run whose reward are label tokens on pairs that the schedule `adaptive` chose.

The judge is `likelihood_pairs`: a rule over likelihoods that a vLLM server gives, behind the real
prompt and the real client. Policy and likelihoods come from vLLM.
"""

import pytest
from likelihood_pairs import pairwise_overrides
from tiny_run import SIP

from megatron_sip.pool_store import read_pools

pytestmark = pytest.mark.full
PAIRS = 9  # of the 15 of five rollouts and the suffix


def test_the_schedule_s_pairs_alone_are_asked_and_teach(workplace, launch, pretrained, monkeypatch):
    without_rewriter = {key: value for key, value in SIP.items() if key != "rewriter"}
    recipe = workplace.recipe(
        without_rewriter, "adaptive", objective__pair_sources=["suffix", "rollout"],
        model__init={"kind": "megatron", "path": str(pretrained.run_dir)},
        rollout__num_rollouts=5, judge__both_orders=0.0,
        curriculum={"kind": "emergent", "sources": ["suffix", "rollout"]},
    )  # fmt: skip
    logs = workplace.folder / "adaptive-logs"
    with pairwise_overrides(recipe, (), budget=0.25, log_dir=logs) as (sets, variables, judge):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        arguments = [part for value in sets for part in ("--set", value)]
        run = launch(recipe, *arguments).wait()
    assert run.process.returncode == 0, run.stderr()
    metrics = run.metrics()
    assert len(metrics) == 3 and all(row["judge/missing"] == 0 for row in metrics)
    assert judge.num_questions == sum(row["judge/paid"] for row in metrics)
    chosen = 0
    pools = run.run_dir / "pools"
    records = [r for step in range(3) for dp in (0, 1)
               for r in read_pools(pools, step, dp_rank=dp, dp_size=2)]  # fmt: skip
    for record in records:
        asked = {frozenset((v.candidate, v.opponent)) for v in record.verdicts}
        assert len(asked) == len(record.verdicts) <= 1.5 * len(record.pool.candidates)
        picked = {pick.role: pick.candidate for pick in record.picks}
        if "chosen" in picked:
            total = record.rewards.total
            assert total[picked["chosen"]] == total.max() > total[picked["rejected"]]
            chosen += 1
    assert chosen and max(len(r.verdicts) for r in records) == PAIRS
