"""Loss and every gradient tensor equal a float64 one-process model under TP, PP, DP and both."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import tasks
import torch
from workers import Layout, Workers

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2)]
MORE_LAYOUTS = [Layout(tp=2, dp=2), Layout(pp=2, dp=2)]  # make test-full
ALL_LAYOUTS = [*LAYOUTS, *(pytest.param(x, marks=pytest.mark.full) for x in MORE_LAYOUTS)]
TOLERANCE = 1e-5  # of a tensor's norm, or of 1e-6 of the norm of all gradients where that is larger
BATCH = 12  # cases of one task: fewer starts of process groups, within the task's time limit
_results: dict[Layout, dict[str, dict[str, Any]]] = {}
_selected: list[str] = []


def result_of(workers: Workers, layout: Layout, name: str) -> dict[str, Any]:
    """Rank 0's result of a case; several cases of a layout run in one task."""
    known = _results.setdefault(layout, {})
    if name not in known:
        asked = [n for n in _selected if n not in known][:BATCH]
        known |= workers.run(layout, tasks.step_all, tuple(dict.fromkeys([name, *asked])))[0]
    return known[name]


@pytest.fixture(scope="module", autouse=True)
def _selection(request: pytest.FixtureRequest) -> None:
    """The cases that this session will ask for."""
    specs = (getattr(item, "callspec", None) for item in request.session.items)
    names = dict.fromkeys(spec.params.get("name") for spec in specs if spec)
    _selected.extend(name for name in names if name in cases.CASES)
    if any(item.name.startswith("test_step_moves") for item in request.session.items):
        _selected[:] = cases.CASES


_plain: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}


def plain(one: dict[str, Any], case: cases.Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the plain model on the weights of the unsplit run."""
    if case.name not in _plain:
        policy = {n: torch.from_numpy(w).double().requires_grad_()
                  for n, w in one["policy"].items()}  # fmt: skip
        reference = {n: torch.from_numpy(w).double() for n, w in one["reference"].items()}
        loss = cases.plain_loss(case, policy, reference)
        loss.backward()
        gradients = {n: w.grad for n, w in policy.items() if w.grad is not None}
        _plain[case.name] = loss.item(), gradients
    return _plain[case.name]


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=str)
def test_loss_and_every_gradient_equal_the_plain_float64_model(
    workers: Workers, layout: Layout, name: str, record_property: Any
) -> None:
    one, found = (result_of(workers, x, name) for x in (LAYOUTS[0], layout))
    assert_like_plain(one, found, cases.CASES[name], record_property)


def assert_like_plain(
    one: dict[str, Any], found: dict[str, Any], case: cases.Case, record_property: Any
) -> None:
    """Loss, gradients, their norm and the entropy of a step, in a layout and unsplit."""
    loss, gradients = plain(one, case)
    assert found["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert set(found["gradients"]) == set(gradients)
    whole = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    worst = {
        n: (torch.from_numpy(found["gradients"][n]).double() - g).norm().item()
        / max(g.norm().item(), 1e-6 * whole)
        for n, g in gradients.items()
    }  # fmt: skip
    record_property("worst_gradient_error", max(worst.values()))
    tolerance = TOLERANCE * (1 if case.model.experts is None else 3)  # one more softmax a layer
    assert max(worst.values()) <= tolerance, sorted(worst.items(), key=lambda x: -x[1])[:5]
    assert found["metrics"]["grad_norm"] == pytest.approx(whole, rel=1e-5)
    entropy = one["metrics"]["objective/entropy"]
    assert found["metrics"]["objective/entropy"] == pytest.approx(entropy, rel=1e-5)
    for tensor, gradient in gradients.items():  # embeddings of tokens that no row holds, and so on
        assert not found["gradients"][tensor][gradient.numpy() == 0].any(), tensor


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_step_moves_the_weights_the_same_way_in_every_layout(
    workers: Workers, layout: Layout
) -> None:
    for name in cases.CASES:
        one = result_of(workers, LAYOUTS[0], name)
        found = result_of(workers, layout, name)
        assert found["tied_agree"]
        for tensor, before in one["policy"].items():
            np.testing.assert_array_equal(found["policy"][tensor], before)
            moved, expected = found["after"][tensor] - before, one["after"][tensor] - before
            # Adam's first step is lr x g / (|g| + 1e-8): compare where rounding leaves g its sign
            # and the clipped g is far above 1e-8
            sure = np.abs(one["gradients"][tensor]) > 1e-4 * np.abs(one["gradients"][tensor]).max()
            np.testing.assert_allclose(moved[sure], expected[sure], rtol=1e-2, atol=1e-6)
        assert any(np.any(found["after"][t] != w) for t, w in one["policy"].items())
