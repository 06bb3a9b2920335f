"""Each candidate meets the same number of others, in one round. Pure."""

from __future__ import annotations

from megatron_sip.config_judge import RandomPairs
from megatron_sip.judge.schedules.all_pairs import all_pairs
from megatron_sip.judge.schedules.pool_state import PoolState, Presentation


def random_pairs(schedule: RandomPairs, state: PoolState) -> list[Presentation]:
    """floor(C x opponents / 2) pairs; all of them from C - 1 opponents on.

    Candidates sit on a circle in seeded order and each meets those at some seeded distances ahead
    of it, first against them: it is first in half of its pairs. An odd number of opponents takes
    a matching on top, of opposite seats or, for odd C, of neighbours, where one sits out and has
    an opponent less. From two opponents on the pairs join the whole pool.
    """
    num, degree = state.num_candidates, schedule.opponents
    if degree >= num - 1:
        return all_pairs(schedule, state)
    seats = state.seated()
    joining = 2 if num % 2 and degree % 2 else 1  # for odd C neighbours are kept for the matching
    others = sorted(range(joining + 1, (num + 1) // 2), key=lambda d: state.draw("distance", d))
    shown = [
        (seats[s], seats[(s + distance) % num])
        for distance in [joining, *others][: degree // 2]
        for s in range(num)
    ]
    if degree % 2 and num % 2:
        matching = [(seats[s], seats[s + 1]) for s in range(0, num - 1, 2)]
    elif degree % 2:
        matching = [(seats[s], seats[s + num // 2]) for s in range(num // 2)]
    else:
        matching = []
    return shown + [(a, b) if state.draw("first", a, b) & 1 else (b, a) for a, b in matching]
