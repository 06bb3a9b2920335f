"""The loss head against log_softmax in float64; no logits of all tokens and all vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sip import loss_head
from megatron_sip.loss_head import label_logprobs, label_logprobs_and_entropy

TOKENS, HIDDEN, VOCABULARY = 37, 24, 101
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BLOCKS = [(2048, 1024), (16, 32), (5, 101), (37, 10), (3, 7)]  # whole, ragged, one divides


def inputs(dtype: torch.dtype, *, scale: float = 3.0) -> Tensors:
    """Hidden states, weight and labels; first and last row of the vocabulary among the labels."""
    generator = torch.Generator().manual_seed(7)
    hidden = scale * torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[:2] = torch.tensor([0, VOCABULARY - 1])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def upstream(dtype: torch.dtype) -> torch.Tensor:
    """Gradients of both signs, some exactly 0."""
    found = torch.randn(TOKENS, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found[::5] = 0
    return found.to(dtype)


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Log-probs, and gradients to hidden and weight, all in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    found = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(len(labels)), labels]
    found.backward(upstream(torch.float64))
    assert hidden.grad is not None and weight.grad is not None
    return found.detach(), hidden.grad, weight.grad


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Tensors:
    hidden.grad = weight.grad = None
    found = label_logprobs(hidden, weight, labels, group=None)
    found.backward(upstream(found.dtype))
    assert hidden.grad is not None and weight.grad is not None
    return found.detach(), hidden.grad, weight.grad


@pytest.fixture(params=BLOCKS, ids=str)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setitem(loss_head.BLOCKS, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_logprobs_and_gradients_equal_log_softmax_in_float64(
    dtype: torch.dtype, tolerance: float
) -> None:
    given = inputs(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    for found, expected, kind in zip(ours(*given), plain(*given), (exact, dtype, dtype)):  # noqa: B905
        assert found.dtype == kind and found.shape == expected.shape
        error = (found.double() - expected).norm() / expected.norm()
        assert error <= tolerance


def test_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_head.BLOCKS, "cpu", (3, 4))
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    labels = torch.tensor([0, 10, 4, 3, 4, 9, 8])
    assert torch.autograd.gradcheck(
        lambda h, w: label_logprobs(h, w, labels, group=None),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.usefixtures("blocks")
def test_entropy_is_that_of_the_softmax_and_leaves_logprobs_as_they_are() -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        hidden, weight, labels = inputs(dtype, scale=1.0)
        logprobs, entropy = label_logprobs_and_entropy(hidden, weight, labels, group=None)
        logs = torch.log_softmax(hidden.double() @ weight.double().T, -1)
        torch.testing.assert_close(
            entropy.double(), -(logs.exp() * logs).sum(-1), rtol=0, atol=20 * tolerance
        )
        assert torch.equal(logprobs, label_logprobs(hidden, weight, labels, group=None))
        assert logprobs.requires_grad and not entropy.requires_grad


def test_entropy_at_its_ends() -> None:
    _, weight, labels = inputs(torch.float32)
    flat = torch.zeros(TOKENS, HIDDEN)
    _, entropy = label_logprobs_and_entropy(flat, weight, labels, group=None)
    torch.testing.assert_close(entropy, torch.full((TOKENS,), math.log(VOCABULARY)))
    sure = 1e4 * weight[labels]  # 1e4 times its own direction leaves no doubt
    logprobs, entropy = label_logprobs_and_entropy(sure, weight, labels, group=None)
    assert torch.isfinite(logprobs).all() and (entropy.abs() < 1e-6).all()


@pytest.mark.usefixtures("blocks")
def test_large_logits_do_not_overflow() -> None:
    given = inputs(torch.float32, scale=1e4)
    for found, expected in zip(ours(*given), plain(*given), strict=True):
        assert torch.isfinite(found).all()
        assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.usefixtures("blocks")
def test_two_runs_are_equal_bit_for_bit() -> None:
    given = inputs(torch.float32)
    first = [x.clone() for x in ours(*given)]
    assert all(torch.equal(a, b) for a, b in zip(first, ours(*given), strict=True))


def test_only_the_wanted_gradients_are_made() -> None:
    hidden, weight, labels = inputs(torch.float64)
    _, grad_hidden, grad_weight = (x.clone() for x in ours(hidden, weight, labels))
    for frozen, expected in ((weight, grad_hidden), (hidden, grad_weight)):
        hidden.grad = weight.grad = None
        frozen.requires_grad_(False)
        label_logprobs(hidden, weight, labels, group=None).backward(upstream(torch.float64))
        frozen.requires_grad_()
        other = hidden if frozen is weight else weight
        assert frozen.grad is None and other.grad is not None
        assert torch.equal(other.grad, expected)
    with torch.no_grad():
        assert not label_logprobs(hidden, weight, labels, group=None).requires_grad


@pytest.mark.usefixtures("blocks")
def test_label_outside_the_vocabulary_is_nan_and_the_others_stay() -> None:
    hidden, weight, labels = inputs(torch.float32)
    wrong = labels.clone()
    wrong[3], wrong[9] = -1, VOCABULARY
    found = label_logprobs(hidden, weight, wrong, group=None)
    expected = label_logprobs(hidden, weight, labels, group=None)
    assert found.isnan().nonzero().flatten().tolist() == [3, 9]
    assert torch.equal(found[wrong == labels], expected[wrong == labels])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("head", [label_logprobs, label_logprobs_and_entropy])
def test_padding_of_the_vocabulary_changes_no_bit_and_gets_no_gradient(head: Any) -> None:
    hidden, weight, labels = inputs(torch.float32)
    expected = ours(hidden, weight, labels)
    large = torch.full((3, HIDDEN), 50.0)  # would be the likeliest tokens of all
    padded = torch.cat([weight.detach(), large]).requires_grad_()
    hidden.grad = None
    found = head(hidden, padded, labels, group=None, vocab_size=VOCABULARY)
    if isinstance(found, tuple):
        entropy = label_logprobs_and_entropy(hidden, weight, labels, group=None)[1]
        assert torch.equal(found[1], entropy)
        found = found[0]
    found.backward(upstream(found.dtype))
    assert hidden.grad is not None and padded.grad is not None
    assert torch.equal(found, expected[0]) and torch.equal(hidden.grad, expected[1])
    assert torch.equal(padded.grad[:VOCABULARY], expected[2]) and not padded.grad[VOCABULARY:].any()
    outside = head(hidden, padded, labels + VOCABULARY, group=None, vocab_size=VOCABULARY)
    assert (outside[0] if isinstance(outside, tuple) else outside).isnan().all()


def test_rank_that_holds_nothing_but_padding_has_no_part_in_the_sums() -> None:
    hidden, weight, labels = inputs(torch.float32)
    found = label_logprobs(hidden, weight, labels, group=None, vocab_size=0)
    assert found.isnan().all()
    found.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


class Sizes(TorchDispatchMode):
    """Elements of the largest storage behind what any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                nbytes = leaf.untyped_storage().nbytes()
                self.largest = max(self.largest, nbytes // leaf.element_size())
        return out


@pytest.mark.parametrize("head", [label_logprobs, label_logprobs_and_entropy])
def test_no_tensor_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch, head: Any) -> None:
    monkeypatch.setitem(loss_head.BLOCKS, "cpu", (64, 128))
    hidden = torch.randn(300, 1, requires_grad=True)
    weight = torch.randn(5000, 1, requires_grad=True)  # the weight itself is smaller than a block
    with Sizes() as sizes:
        found = head(hidden, weight, torch.arange(300), group=None)
        (found[0] if isinstance(found, tuple) else found).sum().backward()
    assert sizes.largest == 64 * 128
