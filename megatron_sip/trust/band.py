"""What of a look must lie in its band. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_sip.config_judge import Criterion, NoveltyCriterion, Trust

ACCURACIES = ("judge/canary_accuracy", "judge/canary_master_keys", "judge/canary_calibration")
CONSISTENCY = "judge/canary_consistency"


def watched(criteria: Sequence[Criterion]) -> list[str]:
    """Metrics that have a band."""
    return [
        f"{kind}/{criterion.name}"
        for criterion in criteria
        if not isinstance(criterion, NoveltyCriterion)
        for kind in (*ACCURACIES, CONSISTENCY)
    ]


def breaches(means: Mapping[str, float], settings: Trust) -> list[str]:
    """What is outside its band, a clause each.

    Args: means: of all ranks, by metric.
    """
    found = []
    for name, value in sorted(means.items()):
        is_order = name.startswith(CONSISTENCY)
        least = settings.min_order_consistency if is_order else settings.min_accuracy
        key = "min_order_consistency" if is_order else "min_accuracy"
        if value < least:
            found.append(f"{name} is {value:.3f}, judge.trust.{key} is {least:g}")
    return found
