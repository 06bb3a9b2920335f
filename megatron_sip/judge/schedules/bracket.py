"""Winners meet winners and losers losers: best and worst in ceil(3 C / 2) - 2 pairs. Pure.

After a first round of pairs the winners play on for the best and the losers for the worst, side by
side, 1 + ceil(log2(ceil(C / 2))) rounds in all. For odd C the one without a partner plays in both.
"""

from __future__ import annotations

from typing import Any

from megatron_sip.judge.schedules.pool_state import (
    Pair,
    PoolState,
    Presentation,
    balanced,
    pair_of,
)


def bracket(schedule: Any, state: PoolState) -> list[Presentation]:
    """The pairs of all rounds up to the first that has no verdicts yet."""
    seats = state.seated()
    if len(seats) < 2:
        return []
    matches, rest = _matched(seats)
    shown = balanced(matches, (), state)
    best, worst = list(rest), list(rest)
    best += [_better(pair, state) for pair in matches]
    worst += [sum(pair) - _better(pair, state) for pair in matches]
    while state.settled.issuperset(matches) and len(best) + len(worst) > 2:
        up, up_rest = _matched(best)
        down, down_rest = _matched(worst)
        matches = up + down
        shown += balanced(matches, shown, state)
        best = up_rest + [_better(pair, state) for pair in up]
        worst = down_rest + [sum(pair) - _better(pair, state) for pair in down]
    return shown


def _matched(players: list[int]) -> tuple[list[Pair], list[int]]:
    """Neighbours as pairs, and who has no partner; that one is first in line the next time."""
    pairs = [pair_of(players[s], players[s + 1]) for s in range(0, len(players) - 1, 2)]
    return pairs, players[2 * len(pairs) :]


def _better(pair: Pair, state: PoolState) -> int:
    """By the table; a seeded bit decides a tie or where there is no verdict."""
    chance = state.table[pair]
    if chance > 0.5:
        return pair[0]
    if chance < 0.5:
        return pair[1]
    return pair[state.draw("tie", *pair) & 1]
