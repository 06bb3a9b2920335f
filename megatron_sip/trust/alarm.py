"""An alarm when the reward rises while what it should stand for falls. Pure.

A policy that learns to please its judge gains reward and loses elsewhere: in held-out likelihood,
in diversity, or in the eyes of a judge whose opinion is no reward (method section 11).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

REWARD = "reward/chosen"
# what must not get worse, and which way that is
WATCHED = {
    "eval/nll": 1, "eval/distinct2": -1, "judge/second_agreement": -1,
}  # fmt: skip
_ERRORS = 2.0  # standard errors of the difference that are no chance


class Alarm:
    """Remembers the last values of what is watched.

    Args: window: values of what is watched over which the first half is compared with the second,
          each beside the mean reward of the steps since the one before.
    """

    def __init__(self, window: int) -> None:
        self._values = {n: deque[tuple[float, float]](maxlen=window) for n in WATCHED}
        self._rewards: dict[str, list[float]] = {n: [] for n in WATCHED}  # since the last value

    def heard(self, metrics: Mapping[str, float]) -> list[str]:
        """Take one step's metrics. Returns: a sentence for each thing that fell as reward rose."""
        found = []
        for name, way in WATCHED.items():
            rewards, values = self._rewards[name], self._values[name]
            if math.isfinite(metrics.get(REWARD, math.nan)):
                rewards.append(metrics[REWARD])
            if not math.isfinite(metrics.get(name, math.nan)) or not rewards:
                continue
            values.append((math.fsum(rewards) / len(rewards), metrics[name]))
            rewards.clear()
            if trend([r for r, _ in values]) > 0 and trend([v for _, v in values]) == way:
                found.append(
                    f"{REWARD} rises while {name} {'rises' if way > 0 else 'falls'}: the policy "
                    "may be learning to please the judge"
                )
        return found


def trend(values: Sequence[float]) -> int:
    """1 or -1 if the mean of the second half is above or below that of the first by more than two
    standard errors, else 0; 0 of fewer than four values."""
    if len(values) < 4:
        return 0
    known, half = list(values), len(values) // 2
    (a, va), (b, vb) = _mean(known[:half]), _mean(known[-half:])
    gap, error = b - a, math.sqrt((va + vb) / half)
    return int(math.copysign(1, gap)) if abs(gap) > _ERRORS * error and gap else 0


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, variance)"""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
