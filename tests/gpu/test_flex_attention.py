"""FlexAttention's compiled kernel against the CPU's dense mask in float64."""

from __future__ import annotations

from typing import Any

import gpu_tasks
import pytest
import torch
from workers import Context

from megatron_sip.branch_attention import block_attention, masked_attention

pytestmark = pytest.mark.gpu

# Rows that share a prefix are as long as the longest needs, so a run meets many lengths.
SHAPES = [(1, 140), (2, 150), (4, 256), (1, 384), (2, 1000), (1, 2000), (1, 100), (8, 24)]
# A softmax over at most 2000 keys: fp32 rounds by 2^-24 a step; in bf16 q, k, v are exact, p and
# the output are rounded by 2^-9 each, gradients through p once more.
CASES = {torch.float32: (1e-5, SHAPES[:2]), torch.bfloat16: (1e-2, SHAPES)}


def branches(rows: int, length: int) -> torch.Tensor:
    """int32[rows, length]: a prefix of a third, branches of uneven lengths, some padding."""
    ids = torch.full((rows, length), -1, dtype=torch.int32)
    make = torch.Generator().manual_seed(length)
    for row in range(rows):
        column, branch = length // 3, 1
        ids[row, :column] = 0
        while column < length - length // 16:
            width = int(torch.randint(1, max(2, length // 6), (), generator=make))
            ids[row, column : column + width] = branch
            column, branch = column + width, branch + 1
    return ids


def tensors(rows: int, length: int, dtype: torch.dtype, device: Any) -> list[torch.Tensor]:
    """Query of 8 heads, key and value of 2, and the gradient to the output; dim 64."""
    make = torch.Generator().manual_seed(rows)
    shapes = [(rows, heads, length, 64) for heads in (8, 2, 2, 8)]
    made = [torch.randn(s, generator=make).to(dtype).to(device) for s in shapes]
    return [t.requires_grad_() for t in made[:3]] + made[3:]


def output_and_gradients(attention: Any, of: list[torch.Tensor], ids: torch.Tensor) -> list[Any]:
    found = attention(*of[:3], ids)
    return [found.detach(), *torch.autograd.grad(found, of[:3], of[3])]


@pytest.mark.parametrize("dtype", CASES, ids=str)
def test_kernel_and_its_gradients_equal_the_dense_mask_at_every_length(
    group: Context, dtype: torch.dtype
) -> None:
    tolerance, shapes = CASES[dtype]
    worst = 0.0
    for rows, length in shapes:
        ids, of = branches(rows, length), tensors(rows, length, dtype, group.platform.device)
        wide = [t.detach().cpu().double() for t in of]
        wide = [t.requires_grad_() for t in wide[:3]] + wide[3:]
        expected = output_and_gradients(masked_attention, wide, ids)
        found = output_and_gradients(block_attention, of, ids.to(of[0].device))
        errors = [gpu_tasks.relative(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(errors) <= tolerance, (rows, length, errors)
        with torch.no_grad():  # as the reference is scored
            frozen = block_attention(*of[:3], ids.to(of[0].device))
        assert torch.equal(frozen, found[0]), (rows, length)
        worst = max(worst, *errors)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{dtype}: worst error {worst:.2g}, {graphs} graphs compiled so far")


def test_backward_gives_the_same_bits_twice() -> None:
    gpu_tasks.alone(same_bits_twice)


def same_bits_twice(ctx: Context) -> None:
    for rows, length in ((2, 1000), (4, 256), (1, 2000)):
        ids = branches(rows, length).to(ctx.platform.device)
        of = tensors(rows, length, torch.bfloat16, ctx.platform.device)
        first, second = (output_and_gradients(block_attention, of, ids) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), (rows, length)
