"""What of a look must lie in its band. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_sip.config_judge import Criterion, NoveltyCriterion, Trust

ACCURACY = "judge/canary_accuracy"
ACCURACIES = (ACCURACY, "judge/canary_master_keys", "judge/canary_calibration")
CONSISTENCY = "judge/canary_consistency"


def watched(criteria: Sequence[Criterion]) -> list[str]:
    """Metrics that have a band."""
    return [
        f"{kind}/{criterion.name}"
        for criterion in criteria
        if not isinstance(criterion, NoveltyCriterion)
        for kind in (*ACCURACIES, CONSISTENCY)
    ]


def breaches(
    sums: Mapping[str, tuple[float, float]], criteria: Sequence[Criterion], settings: Trust
) -> list[str]:
    """What is outside its band, or was to be known and got no answer at all, a clause each.

    Args: sums: (sum, count) over all ranks, by metric.
    """
    silent = [
        f"{name} has no verdict to be made of"
        for c in criteria
        if not isinstance(c, NoveltyCriterion) and c.canary != "none"
        if not sums.get(name := f"{ACCURACY}/{c.name}", (0.0, 0.0))[1]
    ]
    return silent + _outside({k: total / n for k, (total, n) in sums.items() if n}, settings)


def _outside(means: Mapping[str, float], settings: Trust) -> list[str]:
    """Means outside their bands."""
    found = []
    for name, value in sorted(means.items()):
        is_order = name.startswith(CONSISTENCY)
        least = settings.min_order_consistency if is_order else settings.min_accuracy
        key = "min_order_consistency" if is_order else "min_accuracy"
        if value < least:
            found.append(f"{name} is {value:.3f}, judge.trust.{key} is {least:g}")
    return found
