"""Gaps between trainer and engine: by hand, and which limit stops a step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sip.config import Rollout
from megatron_sip.mismatch import MismatchLimits, broken_limit, limits_of, mismatch_metrics

GAPS = np.float32([0.1] * 98 + [-0.5, 2.0])


def test_metrics_by_hand() -> None:
    found = mismatch_metrics(GAPS)
    assert found["rollout/logprob_mismatch"] == pytest.approx((9.8 + 0.5 + 2.0) / 100)
    assert found["rollout/logprob_mismatch_max"] == 2.0
    # quantile 0.99 of 100 values: a hundredth of the way from the 99th to the 100th
    assert found["rollout/logprob_mismatch_p99"] == pytest.approx(0.5 + 0.01 * 1.5)
    k3 = [math.exp(g) - 1 - g for g in (0.1, -0.5, 2.0)]
    assert found["rollout/kl"] == pytest.approx((98 * k3[0] + k3[1] + k3[2]) / 100)
    assert mismatch_metrics(np.zeros(0, np.float32)) == {}


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (MismatchLimits(), None),
        (MismatchLimits(p99=0.52, maximum=2.1, kl=0.06), None),
        (MismatchLimits(p99=0.5), "rollout.max_logprob_mismatch_p99 is 0.5"),
        (MismatchLimits(maximum=1.9), "rollout.max_logprob_mismatch_max is 1.9"),
        (MismatchLimits(kl=0.04), "rollout.max_kl is 0.04"),
    ],
)
def test_limit_that_is_broken_is_named(limits: MismatchLimits, said: str | None) -> None:
    found = broken_limit(mismatch_metrics(GAPS), limits)
    assert found is None if said is None else found is not None and said in found


def test_gap_that_is_no_number_breaks_every_limit() -> None:
    found = mismatch_metrics(np.float32([0.0, math.nan]))
    for limits in (MismatchLimits(p99=9), MismatchLimits(maximum=9), MismatchLimits(kl=9)):
        assert broken_limit(found, limits) is not None


def test_limits_come_from_the_recipe_and_are_infinite_where_left_out() -> None:
    rollout = Rollout(
        server="p", num_rollouts=2, weight_transfer="nccl", max_logprob_mismatch=0.1, max_kl=0.5
    )
    assert limits_of(rollout) == MismatchLimits(0.1, math.inf, math.inf, 0.5)
    assert limits_of(rollout).need_all_ranks and not limits_of(None).need_all_ranks
