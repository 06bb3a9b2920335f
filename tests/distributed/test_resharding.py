"""A checkpoint with experts, or a padded vocabulary, goes on in other layouts as it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import expert_tasks
import numpy as np
import pytest
from workers import Layout, Workers

EXPERTS, DENSE = ("mixtral", "qwen3_moe"), ("qwen2", "llama3")
Saved = tuple[Path, dict[str, Any]]
SAVED = {
    "experts": (Layout(pp=2, dp=2, ep=2), EXPERTS),
    "experts together": (Layout(dp=2), EXPERTS[:1]),
    "dense": (Layout(tp=2, dp=2), DENSE),
}
OTHER = [
    ("experts", Layout(dp=4, ep=4)),
    ("experts together", Layout(dp=2, ep=2)),
]
MORE = [  # make test-full
    ("experts", Layout()),
    ("experts", Layout(dp=2)),
    ("experts", Layout(dp=4, ep=2)),
    ("dense", Layout(pp=2)),
    ("dense", Layout(dp=2)),
    ("dense", Layout(tp=2, pp=2)),
]


_saved: dict[str, Saved] = {}


@pytest.fixture
def saved(workers: Workers, tmp_path_factory: pytest.TempPathFactory, kind: str) -> Saved:
    """Root of the checkpoints of a kind, and what came of them in the layout that made them."""
    if kind not in _saved:
        layout, names = SAVED[kind]
        root = tmp_path_factory.mktemp(kind)
        _saved[kind] = root, workers.run(layout, expert_tasks.saved, names, root)[0]
    return _saved[kind]


@pytest.mark.parametrize("kind", ["experts", pytest.param("dense", marks=pytest.mark.full)])
def test_same_layout_goes_on_bit_for_bit(workers: Workers, saved: Saved, kind: str) -> None:
    layout, (root, expected) = SAVED[kind][0], saved
    found = workers.run(layout, expert_tasks.loaded, SAVED[kind][1], root)[0]
    for name, one in expected.items():
        for moment in ("saved", "learned"):
            for tensor, weights in one[moment].items():
                assert found[name][moment][tensor].tobytes() == weights.tobytes(), (name, tensor)
        assert any(np.any(one["saved"][t] != w) for t, w in one["learned"].items())


@pytest.mark.parametrize(
    ("kind", "layout"), [*OTHER, *(pytest.param(*x, marks=pytest.mark.full) for x in MORE)], ids=str
)
def test_another_layout_has_the_same_weights_and_learns_the_same(
    workers: Workers, saved: Saved, kind: str, layout: Layout
) -> None:
    root, expected = saved
    found = workers.run(layout, expert_tasks.loaded, SAVED[kind][1], root)[0]
    for name, one in expected.items():
        assert found[name]["saved"].keys() == one["saved"].keys()
        for tensor, weights in one["saved"].items():
            assert found[name]["saved"][tensor].tobytes() == weights.tobytes(), (name, tensor)
        for tensor, weights in one["learned"].items():
            np.testing.assert_allclose(found[name]["learned"][tensor], weights, atol=1e-4)
