"""What a gate stops is never chosen, imitated or reinforced, and may be rejected."""

from __future__ import annotations

from typing import Any

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


def test_grpo_counts_what_is_stopped_as_the_worst_that_passes() -> None:
    grpo = GrpoObjective(name="grpo", advantage="centered")
    after = picks(grpo, [False, False, True, True])  # totals 1, 4, 3, 2 count as 1, 2, 3, 2
    assert [(a, w) for _, _, a, w in after] == [(-1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 1.0)]
    assert [(a, w) for _, _, a, w in picks(grpo, [True] * 4)] == [
        (-1.5, 1.0), (1.5, 1.0), (0.5, 1.0), (-0.5, 1.0),
    ]  # fmt: skip


def test_grpo_reinforces_nobody_for_being_less_bad_than_others_that_are_stopped() -> None:
    grpo = GrpoObjective(name="grpo")
    assert all(w == 0 for *_, w in picks(grpo, [False] * 4))
    (found,) = picks_of(
        [POOL], [rewards([10.0, 1.0, 0.0, -5.0], passes=[False, True, True, False])], grpo, seed=1
    )
    stopped, best, worst, low = (p.advantage for p in found)
    assert best > worst > stopped == 0 > low  # stopped counts as 0 like worst, and is not raised
