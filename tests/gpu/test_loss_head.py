"""The loss head's log-probs and gradients, its memory, and how its time compares."""

from __future__ import annotations

from typing import Any

import gpu_tasks
import pytest
import torch
import torch.nn.functional as F

from megatron_sip import loss_head

pytestmark = pytest.mark.gpu

T, H, V = 8192, 1024, 50304  # as a small Llama trains; no multiple of a block


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels and the gradient to the log-probs; logits of about +-1.5."""
    make = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(T, H, generator=make, device="cuda").to(dtype)
    weight = (0.05 * torch.randn(V, H, generator=make, device="cuda")).to(dtype)
    labels = torch.randint(0, V, (T,), generator=make, device="cuda")
    upstream = torch.randn(T, generator=make, device="cuda") / T
    return hidden.requires_grad_(), weight.requires_grad_(), labels, upstream


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return loss_head.label_logprobs(hidden, weight, labels, group=None)


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """By all logits at once, rounded to the inputs' dtype before the softmax, as ours are."""
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return -F.cross_entropy(logits, labels, reduction="none")


def gradients(head: Any, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-probs and gradients to hidden states and weight."""
    hidden, weight, labels, upstream = of
    found = head(hidden, weight, labels)
    return found.detach(), *torch.autograd.grad(found, (hidden, weight), upstream.to(found.dtype))


# fp32: sums over 1024 and 50304 terms in blocks, each rounded by 2^-24: well below 1e-5.
# bf16: inputs are exact, a logit is rounded by at most 2^-9 of its 1.5, so a log-prob of 11 nats by
# 3e-3; p is rounded by 2^-9 before it is multiplied, a gradient once more at its end: 2 x 2^-9.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)], ids=str
)
def test_log_probs_and_gradients_equal_float64(dtype: torch.dtype, tolerance: float) -> None:
    of = tensors(dtype)
    found = gradients(ours, *of)
    wide = (of[0].detach().double().requires_grad_(), of[1].detach().double().requires_grad_())
    expected = gradients(plain, *wide, *of[2:])
    errors = [gpu_tasks.relative(a, b) for a, b in zip(found, expected, strict=True)]
    print(f"{dtype}: relative errors of log-probs, hidden, weight: {errors}")
    assert max(errors) <= tolerance
    again = gradients(ours, *of)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_entropy_equals_float64() -> None:
    hidden, weight, labels, _ = (t.detach() for t in tensors(torch.bfloat16))
    found = loss_head.label_logprobs_and_entropy(hidden, weight, labels, group=None)[1]
    logs = (hidden.double() @ weight.double().t()).log_softmax(-1)
    assert gpu_tasks.relative(found, -(logs.exp() * logs).sum(-1)) <= 8e-3


def peak(head: Any, of: tuple[torch.Tensor, ...]) -> int:
    """Bytes above the inputs that forward and backward hold at the most."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(head, *of)
    return torch.cuda.max_memory_allocated() - before


def milliseconds(head: Any, of: tuple[torch.Tensor, ...]) -> float:
    """Median of forward and backward."""
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        gradients(head, *of)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[3]


def test_memory_is_a_block_and_the_gradients_not_all_logits(
    monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    of = tensors(torch.bfloat16)
    grads = of[0].nbytes + of[1].nbytes
    tokens, vocabulary = loss_head.BLOCKS["cuda"]
    block = 4 * tokens * vocabulary
    mine, whole = peak(ours, of) - grads, peak(plain, of) - grads
    # 4 bytes a logit of the block and 2 before they are widened, 2 where p goes into a product,
    # fp32 sums of both gradients: of the hidden states, and of a block of the weight
    assert mine <= 2 * block + 4 * of[0].numel() + 4 * vocabulary * H + 64 * T
    assert whole >= 4 * T * V
    record_property("memory_ratio", whole / mine)
    print(f"memory above inputs and gradients: {mine / 2**20:.0f} MiB, by all logits "
          f"{whole / 2**20:.0f} MiB")  # fmt: skip
    plain_ms = milliseconds(plain, of)
    for blocks in ((2048, 8192), (4096, 8192), (8192, 8192), (8192, 16384), (2048, 1024)):
        monkeypatch.setitem(loss_head.BLOCKS, "cuda", blocks)
        mine_ms = milliseconds(ours, of)
        print(f"blocks of {blocks}: {mine_ms:.2f} ms, {mine_ms / plain_ms:.2f} of all logits' "
              f"{plain_ms:.2f} ms")  # fmt: skip
