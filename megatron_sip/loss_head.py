"""Log-probs of given labels straight from hidden states, without a [tokens, vocabulary] tensor.

    logprob_t = z_ty - log sum_v exp z_tv,    z = hidden weight^T,  y the label of t, v all tokens
    entropy_t = log sum_v exp z_tv - sum_v p_tv z_tv,   p = softmax z
    d logprob_t / d z_tv = [v = y] - p_tv

The vocabulary may be cut over tensor-parallel ranks. Logits exist for one block of tokens and
vocabulary at a time; the backward pass computes them once more. Sums run in a fixed order, so
equal inputs give equal bits. No temperature, no label smoothing, no bias.

Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867; the same idea for linear and
cross entropy in one, Wijmans et al., arXiv 2411.09009.

Legend: T tokens, H hidden size, V rows of this rank's slice of the weight; t, v those of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# Most tokens and vocabulary of a block. The weight is read once for each block of tokens. On a CPU
# 8 MiB of fp32 logits stay in the cache, which makes the softmax a third faster than 32 MiB do, and
# the products are as fast; a GPU wants few launches (H100, 8192 tokens: 2048 tokens a block take a
# fifth longer, twice the vocabulary is 4 % faster).
BLOCKS = {"cpu": (2048, 1024), "cuda": (8192, 8192)}


def label_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, group: Any,
    vocab_size: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Log-prob of each label, with gradients to `hidden` and `weight`.

    Args:    hidden: [T, H], the same on all ranks of `group`. Its gradient is this rank's part:
             the sum over `group` is the caller's.
             weight: [V, H] of the same dtype, this rank's slice, in rank order.
             labels: int64[T], of the whole vocabulary.
             group: tensor-parallel process group; None for one rank.
             vocab_size: rows from here on, over all ranks, are padding: no token, no gradient.
    Returns: [T], nats, float32 (float64 for float64 inputs). Logits are rounded to the inputs'
             dtype before, as vLLM's are. NaN for a label outside the vocabulary: a check that
             raises would wait for the device in every pass, and a NaN stops the step.
    """
    return _LabelLogprobs.apply(hidden, weight, labels, group, vocab_size, False)[0]


def label_logprobs_and_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, group: Any,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same, and the entropy of each token's distribution: [T], nats, without gradient."""
    return _LabelLogprobs.apply(hidden, weight, labels, group, vocab_size, True)


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        group: Any,
        vocab_size: int | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = dist.get_rank(group) * len(weight) if group else 0
        vocabulary = dist.get_world_size(group) * len(weight) if group else len(weight)
        vocabulary = vocabulary if vocab_size is None else vocab_size
        rows = labels - first  # of the weight; other ranks' labels fall outside [0, V)
        ctx.used = max(0, min(len(weight), vocabulary - first))  # rows that are no padding
        sums = _sums_of_slice(hidden, weight[: ctx.used], rows, with_entropy=with_entropy)
        top, total, target, energy = _join(sums, group) if group else sums
        log_total = total.log()
        known = (labels >= 0) & (labels < vocabulary)
        logprobs = ((target - top) - log_total).where(known, torch.nan)
        entropy = log_total - energy / total
        ctx.save_for_backward(hidden, weight, rows, top, total)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, rows, top, total = ctx.saved_tensors
        block = _Block(hidden, weight[: ctx.used])
        log_sum = (top + total.log())[:, None]
        pulled = hidden * -grad[:, None].to(hidden.dtype)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(hidden, dtype=total.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            grad_weight[ctx.used :] = 0
        spare = torch.empty_like(weight[: block.size[1]], dtype=total.dtype)
        for v in block.vocabulary():
            grad_slice = spare[: v.stop - v.start].zero_()
            for t in block.tokens():  # p becomes p - [v = y], minus the gradient to the logits
                p = block.logits(t, v, less=log_sum[t]).exp_()
                column, inside = _columns(rows[t], v)
                p.scatter_(1, column, p.gather(1, column) - inside[:, None].to(p.dtype))
                p = p.to(weight.dtype)
                if grad_hidden is not None:
                    _add_product(grad_hidden[t], p, weight[v])
                if grad_weight is not None:
                    _add_product(grad_slice, p.t(), pulled[t])
            if grad_weight is not None:
                grad_weight[v] = grad_slice
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(-grad[:, None]).to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _Block:
    """Logits of one block at a time, all in one piece of memory."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        tokens, vocabulary = BLOCKS[hidden.device.type]
        self.size = min(tokens, len(hidden)), min(vocabulary, max(1, len(weight)))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        self.memory = hidden.new_empty(self.size[0] * self.size[1], dtype=exact)

    def tokens(self) -> Iterator[slice]:
        return _pieces(len(self.hidden), self.size[0])

    def vocabulary(self) -> Iterator[slice]:
        return _pieces(len(self.weight), self.size[1])

    def logits(self, t: slice, v: slice, less: torch.Tensor | None = None) -> torch.Tensor:
        """[t, v], float32 or float64, less [t, 1] if given; overwrites the block before."""
        tokens, slice_t = self.hidden[t], self.weight[v].t()
        out = self.memory[: len(tokens) * slice_t.shape[1]].view(len(tokens), -1)
        if tokens.dtype != out.dtype:
            out.copy_(torch.mm(tokens, slice_t))
            return out if less is None else out.sub_(less)
        if less is None:
            return torch.mm(tokens, slice_t, out=out)
        return torch.addmm(less, tokens, slice_t, beta=-1, out=out)  # one pass less over the block


def _pieces(count: int, size: int) -> Iterator[slice]:
    """[0, count) in pieces of at most `size`."""
    yield from (slice(i, min(i + size, count)) for i in range(0, count, size))


def _columns(rows: torch.Tensor, v: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[t, 1] where in block v a token's label stands, and bool[t] whether it does at all."""
    column, width = rows - v.start, v.stop - v.start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def _sums_of_slice(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, *, with_entropy: bool
) -> torch.Tensor:
    """[4, T] over this rank's vocabulary: largest logit m, sum of exp(z - m), the label's logit
    (0 where another rank holds it), sum of exp(z - m) (z - m) (0 unless asked for)."""
    block = _Block(hidden, weight)
    sums = block.memory.new_zeros(4, len(hidden))
    sums[0] = torch.finfo(sums.dtype).min
    spare = torch.empty_like(block.memory) if with_entropy else block.memory
    for v in block.vocabulary():
        for t in block.tokens():
            z = block.logits(t, v)
            top, total, target, energy = sums[:, t]
            column, inside = _columns(rows[t], v)
            target.copy_(z.gather(1, column)[:, 0].where(inside, target))
            highest = torch.maximum(top, z.amax(1))
            z.sub_(highest[:, None])
            powers = torch.exp(z, out=spare[: z.numel()].view_as(z))
            _move(total, energy, top - highest)
            total.add_(powers.sum(1))
            if with_entropy:
                energy.add_(z.mul_(powers).sum(1))
            top.copy_(highest)
    return sums


def _move(total: torch.Tensor, energy: torch.Tensor, shift: torch.Tensor) -> None:
    """Sums over exp(z - m) and exp(z - m) (z - m), for a maximum that is -shift larger."""
    energy.add_(shift * total).mul_(shift.exp())
    total.mul_(shift.exp())


def _join(sums: torch.Tensor, group: Any) -> torch.Tensor:
    """Sums of all ranks' slices from those of each."""
    top = sums[0].clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    _, total, _, energy = sums
    _move(total, energy, sums[0] - top)
    dist.all_reduce(sums[1:], group=group)
    return torch.cat([top[None], sums[1:]])


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b; the product is made in their dtype and added in that of `total`."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total.add_(torch.mm(a, b))
