"""What a gate stops is never chosen, imitated or reinforced, and may be rejected."""

from __future__ import annotations

from typing import Any

import pytest
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.config_objective import DpoObjective, GrpoObjective, RfNllObjective
from megatron_sip.objectives import picks_of

POOL = pool(sample(), *(candidate((i, i + 1)) for i in range(4)))
TOTALS = [1.0, 4.0, 3.0, 2.0]


def picks(settings: Any, passes: list[bool]) -> list[tuple[int, str, float, float]]:
    (found,) = picks_of([POOL], [rewards(TOTALS, passes=passes)], settings, seed=1)
    return [(p.candidate, p.role, p.advantage, p.weight) for p in found if p.candidate >= 0]


def test_dpo_chooses_the_best_that_passes_and_rejects_what_is_stopped() -> None:
    dpo = DpoObjective(name="dpo")
    open_to_all = [(1, "chosen", 0.0, 1.0), (0, "rejected", 0.0, 1.0)]
    assert picks(dpo, [True] * 4) == open_to_all
    assert picks(dpo, [True, False, True, True]) == [
        (2, "chosen", 0.0, 1.0), (1, "rejected", 0.0, 1.0),
    ]  # fmt: skip
    assert all(weight == 0 for *_, weight in picks(dpo, [False] * 4))


def test_of_two_pairs_the_one_whose_chosen_is_stopped_is_dead() -> None:
    two = DpoObjective(name="dpo", pairs_per_pool=2)
    assert picks(two, [False, False, True, False]) == [
        (2, "chosen", 0.0, 1.0), (0, "rejected", 0.0, 1.0),
        (1, "chosen", 0.0, 0.0), (3, "rejected", 0.0, 0.0),
    ]  # fmt: skip


def test_rf_nll_imitates_the_best_that_passes_or_nothing() -> None:
    rf_nll = RfNllObjective(name="rf_nll")
    assert picks(rf_nll, [True, False, True, True]) == [(2, "target", 0.0, 1.0)]
    (found,) = picks_of([POOL], [rewards(TOTALS, passes=[False] * 4)], rf_nll, seed=1)
    assert [p.weight for p in found] == [0.0]


def test_grpo_lowers_what_is_stopped_and_never_raises_it() -> None:
    grpo = GrpoObjective(name="grpo")
    before = picks(grpo, [True] * 4)
    after = picks(grpo, [False, False, True, True])
    assert [a for _, _, a, _ in before][1] > 0
    for (_, _, was, _), (_, _, now, weight), stopped in zip(
        before, after, [True, True, False, False], strict=True
    ):
        assert weight == 1 and now == pytest.approx(min(was, 0.0) if stopped else was)
