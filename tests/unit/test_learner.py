"""What a micro-batch reports beside its loss."""

from __future__ import annotations

import pytest
import torch
from pool_helpers import candidate, pool, sample

from megatron_sip.config_objective import RfNllObjective
from megatron_sip.learner import TOKENS, _micro_loss
from megatron_sip.objectives import OBJECTIVES
from megatron_sip.rows import make_rows
from megatron_sip.types import Pick


def test_entropy_is_reported_over_live_scored_labels_alone() -> None:
    settings = RfNllObjective(name="rf_nll")
    pools = [
        pool(sample(i, (1, 2, 3), (4, 5)), candidate(ids)) for i, ids in ((1, (6, 7)), (2, (8,)))
    ]
    picks = [[Pick(0, "target", 0.0, 1.0)], [Pick(0, "target", 0.0, 0.0)]]  # the second is dead
    rows = make_rows(pools, picks, length=6, pad=0)
    entropy_RS = torch.full((2, 6), torch.nan)
    entropy_RS[0, 2:4] = torch.tensor([0.25, 0.5])  # where labels 6 and 7 stand
    loss = OBJECTIVES["rf_nll"][1]
    micro = _micro_loss(loss, settings, {"nll": 2.0, TOKENS: 2.0}, version=0)
    _, tokens, report = micro(torch.zeros(2, 6), entropy_RS, rows)
    assert tokens == 2 and tokens.dtype == torch.int32
    assert report["means"]["objective/entropy"] == (pytest.approx(0.75), 2.0)
