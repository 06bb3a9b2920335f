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

    Args: window: values over which the first half is compared with the second.
    """

    def __init__(self, window: int) -> None:
        self._values = {n: deque[float](maxlen=window) for n in (REWARD, *WATCHED)}

    def heard(self, metrics: Mapping[str, float]) -> list[str]:
        """Take one step's metrics. Returns: a sentence for each thing that fell as reward rose."""
        for name, values in self._values.items():
            if math.isfinite(metrics.get(name, math.nan)):
                values.append(metrics[name])
        if trend(self._values[REWARD]) <= 0:
            return []
        return [
            f"{REWARD} rises while {name} "
            f"{'rises' if way > 0 else 'falls'}: the policy may be learning to please the judge"
            for name, way in WATCHED.items()
            if name in metrics and trend(self._values[name]) == way
        ]


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
