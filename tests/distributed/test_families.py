"""Every family with a padded vocabulary trains as a float64 one-process model does."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import tasks
from test_parity import assert_like_plain
from workers import Layout, Workers

ONE = Layout()
MORE = [
    ONE,
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=2),
    Layout(tp=2, dp=2),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=4),
]
LAYOUTS = [
    Layout(tp=2, pp=2),
    Layout(pp=2, dp=2),
    Layout(pp=2, dp=2, ep=2),
    *(pytest.param(x, marks=pytest.mark.full) for x in MORE),
]
_results: dict[Layout, dict[str, dict[str, Any]]] = {}


def results_of(workers: Workers, layout: Layout) -> dict[str, dict[str, Any]]:
    """Rank 0's results; Megatron-Core trains experts under TP with sequence parallel alone."""
    names = tuple(
        name for name, case in cases.FAMILIES.items()
        if (layout.ep == 1 if case.model.experts is None else layout.tp == 1)
    )  # fmt: skip
    if layout not in _results:
        _results[layout] = workers.run(layout, tasks.step_all, names)[0]
    return _results[layout]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_and_every_gradient_of_each_family_equal_the_plain_float64_model(
    workers: Workers, layout: Layout, record_property: Any
) -> None:
    one, found = results_of(workers, ONE), results_of(workers, layout)
    for name, result in found.items():
        for tensor, weights in one[name]["policy"].items():
            np.testing.assert_array_equal(result["policy"][tensor], weights)
        assert result["tied_agree"], name
        assert_like_plain(one[name], result, cases.FAMILIES[name], record_property)
