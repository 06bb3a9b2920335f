"""Each candidate against one, in one round: C - 1. Pure."""

from __future__ import annotations

from typing import Any

from megatron_sip.judge.schedules.pool_state import PoolState, Presentation


def against_pivot(schedule: Any, state: PoolState) -> list[Presentation]:
    """The pivot is the pool's, or drawn by seed; it is first in half of its pairs."""
    if state.num_candidates < 2:
        return []
    seats = state.seated()
    pivot = seats[0] if state.pivot is None else state.pivot
    others = [c for c in seats if c != pivot]
    odd = state.draw("first") & 1
    return [(pivot, c) if (s + odd) % 2 else (c, pivot) for s, c in enumerate(others)]
