"""Every pair of a pool, in one round: C (C - 1) / 2. Pure."""

from __future__ import annotations

from typing import Any

from megatron_sip.judge.schedules.pool_state import PoolState, Presentation


def all_pairs(schedule: Any, state: PoolState) -> list[Presentation]:
    """Each candidate is first in half of its pairs (rounded up or down), whatever the seed.

    Candidates are seated on a circle in seeded order; each is first against the half that
    follows it, and a seeded bit decides between opposite seats.
    """
    num = state.num_candidates
    seat = {c: s for s, c in enumerate(state.seated())}
    shown = []
    for i in range(num):
        for j in range(i + 1, num):
            ahead = (seat[j] - seat[i]) % num
            first = state.draw(i, j) & 1 if 2 * ahead == num else 2 * ahead < num
            shown.append((i, j) if first else (j, i))
    return shown
