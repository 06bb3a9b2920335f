"""Log-probs, entropy and gradients of the loss head do not depend on tensor parallelism."""

from __future__ import annotations

import head_tasks
import numpy as np
import pytest
import torch
from workers import Layout, Workers

ONE, TWO = Layout(), Layout(tp=2)
TOLERANCE = 1e-5


def plain(head: head_tasks.Head) -> dict[str, np.ndarray]:
    """The same from log_softmax in float64, on hidden states and weight of one rank."""
    hidden = torch.from_numpy(head.hidden).double().transpose(0, 1).requires_grad_()
    weight = torch.from_numpy(head.weight).double().requires_grad_()
    logs = torch.log_softmax(hidden @ weight.T, -1)
    nll = -logs.gather(-1, head_tasks.labels()[..., None])[..., 0]
    nll.backward(head_tasks.upstream().double())
    assert hidden.grad is not None and weight.grad is not None
    found = {
        "nll": nll, "entropy": -(logs.exp() * logs).sum(-1),
        "grad_hidden": hidden.grad.transpose(0, 1), "grad_weight": weight.grad,
        "logits": hidden @ weight.T,
    }  # fmt: skip
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("tied", [False, True])
def test_two_slices_of_the_vocabulary_equal_one_and_the_plain_float64_formula(
    workers: Workers, tied: bool
) -> None:
    (one,) = workers.run(ONE, head_tasks.head, tied, False)
    two = workers.run(TWO, head_tasks.head, tied, False)
    expected = plain(one)
    np.testing.assert_array_equal(np.concatenate([rank.weight for rank in two]), one.weight)
    for name in ("nll", "entropy", "grad_hidden"):
        assert_close(getattr(one, name), expected[name])
        for rank in two:
            assert_close(getattr(rank, name), expected[name])
        np.testing.assert_array_equal(getattr(two[0], name), getattr(two[1], name))
    for name, axis in (("grad_weight", 0), ("logits", -1)):
        assert_close(getattr(one, name), expected[name])
        assert_close(np.concatenate([getattr(r, name) for r in two], axis), expected[name])


def test_sequence_parallel_hidden_states_give_the_same_and_get_their_own_gradient(
    workers: Workers,
) -> None:
    (one,) = workers.run(ONE, head_tasks.head, False, False)
    two = workers.run(TWO, head_tasks.head, False, True)
    for rank in two:
        assert_close(rank.nll, one.nll)
        assert_close(rank.entropy, one.entropy)
    for name in ("hidden", "grad_hidden", "grad_weight"):
        assert_close(np.concatenate([getattr(r, name) for r in two]), getattr(one, name))


def test_two_runs_on_two_ranks_are_equal_bit_for_bit(workers: Workers) -> None:
    first, second = (workers.run(TWO, head_tasks.head, False, False) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for name in ("nll", "entropy", "grad_hidden", "grad_weight"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
