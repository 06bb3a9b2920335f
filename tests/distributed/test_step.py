"""Rows reach every rank of a replica; a step that must stop stops on every rank, unchanged."""

from __future__ import annotations

import pytest
import tasks
import torch
from workers import Layout, Workers

HARMS = {
    "nan": "are not finite",
    "inf": "are not finite",
    "nan weights": "are not finite",
    "nan gradient": "are not finite",
    "mismatch": "max_logprob_mismatch is 0.5",
    "mismatch of the 99th percentile": "max_logprob_mismatch_p99 is 1",
    "largest mismatch": "max_logprob_mismatch_max is 30",
    "KL": "max_kl is 0.5",
    "stale reference": "not scored by the same numerics",
}


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=2, dp=2)], ids=str)
def test_all_ranks_of_a_replica_hold_the_same_rows(workers: Workers, layout: Layout) -> None:
    for name in ("dpo", "rf_nll"):
        found = workers.run(layout, tasks.received_rows, name)
        by_replica = {r["replica"]: r["rows"] for r in found}
        assert len(by_replica) == layout.dp
        assert all(r["rows"] == by_replica[r["replica"]] for r in found)
        assert layout.dp == 1 or by_replica[0] != by_replica[1]


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(pp=2, dp=2), Layout(tp=2)], ids=str)
@pytest.mark.parametrize("harm", HARMS)
def test_harm_on_one_replica_stops_every_rank_and_changes_no_weight(
    workers: Workers, harm: str, layout: Layout
) -> None:
    for answer in workers.run(layout, tasks.stopped_step, harm):
        assert answer["stopped"] is not None and HARMS[harm] in answer["stopped"]
        assert answer["unchanged"]
        assert answer["schedule"] == 0
        assert answer["seconds"] < 30


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(tp=2, pp=2)], ids=str)
def test_step_without_a_live_pair_moves_no_weight_but_the_schedule(
    workers: Workers, layout: Layout
) -> None:
    for answer in workers.run(layout, tasks.stopped_step, "nothing to learn"):
        assert answer == answer | {"stopped": None, "unchanged": True, "schedule": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["dpo", "dpo_shared", "dpo_recompute"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2)], ids=str)
def test_margin_is_exactly_zero_against_a_copy_of_the_policy(
    workers: Workers, layout: Layout, case: str, dtype: torch.dtype
) -> None:
    metrics = workers.run(layout, tasks.fresh_reference_step, case, dtype)[0]
    assert metrics["objective/margin"] == 0.0
    assert metrics["objective/dpo"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert metrics["objective/chosen_logratio"] == 0.0
    assert metrics["grad_norm"] > 0
