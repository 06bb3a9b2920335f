"""A branch sees the prefix and itself; each kernel gives what a loop over queries gives."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_sip import branch_attention
from megatron_sip.branch_attention import (
    NEEDED,
    BranchAttention,
    OncePerMicroBatch,
    block_mask,
    masked_attention,
    visible,
    with_branch_attention,
)

IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1], [0, 1, 1, 1, 2, 3, 3, 3]], dtype=torch.int32)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys each query may see, one query at a time."""
    out = torch.zeros_like(q)
    heads = q.shape[1] // k.shape[1]
    for b, n, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        mine = int(ids[b, i])
        seen = [j for j in range(i + 1) if int(ids[b, j]) in (0, mine)]
        scores = k[b, n // heads, seen] @ q[b, n, i] / math.sqrt(q.shape[-1])
        out[b, n, i] = scores.softmax(0) @ v[b, n // heads, seen]
    return out


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 4, 8, 32), (2, 2, 8, 32), (2, 2, 8, 32)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [m.to(dtype).requires_grad_() for m in made]


def test_branch_sees_the_prefix_and_itself_up_to_itself() -> None:
    seen = visible(IDS)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("branched", [True, False])
def test_masked_attention_and_its_gradients_are_those_of_a_loop_over_queries(
    branched: bool,
) -> None:
    wide, narrow = tensors(torch.float64), tensors(torch.float32)
    expected = plain(*wide, IDS if branched else torch.zeros_like(IDS))
    found = masked_attention(*narrow, IDS if branched else None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4)).double()
    (expected * weight).sum().backward()
    (found * weight.float()).sum().backward()
    for mine, theirs in zip(narrow, wide, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_flex_attention_with_the_block_mask_gives_the_same() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (t.detach() for t in tensors(torch.float32))
    found = flex_attention(q, k, v, block_mask=block_mask(IDS), enable_gqa=True)
    torch.testing.assert_close(found, masked_attention(q, k, v, IDS), rtol=1e-5, atol=1e-6)


def test_the_kernel_is_flex_attentions_own_and_is_never_silently_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    asked, compiled = [], []
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch, "compile", lambda f, **named: compiled.append((f, named)) or f)
    branch_attention.compiled_flex_attention.__wrapped__()
    assert compiled == [(flex_attention, {"fullgraph": True})]  # an error past the limit
    assert torch._dynamo.config.recompile_limit == branch_attention.KERNELS

    def kernel(*tensors: torch.Tensor, **named: object) -> torch.Tensor:
        asked.append(named["kernel_options"])
        return flex_attention(*tensors, **named)

    monkeypatch.setattr(branch_attention, "compiled_flex_attention", lambda: kernel)
    q, k, v = (t.detach() for t in tensors(torch.float32))
    found = branch_attention.block_attention(q, k, v, IDS)
    torch.testing.assert_close(found, masked_attention(q, k, v, IDS), rtol=1e-5, atol=1e-6)
    assert asked == [{"FORCE_USE_FLEX_ATTENTION": True}]  # not the one for decoding


def test_another_branch_changes_nothing_and_gets_no_gradient() -> None:
    q, k, v = tensors(torch.float32)
    first = masked_attention(q, k, v, IDS)[0, :, 5:7]  # branch 2 of row 0
    grads = torch.autograd.grad(first.sum(), (k, v))
    for grad in grads:
        assert grad[0, :, 3:5].eq(0).all() and grad[0, :, 7:].eq(0).all() and grad[1].eq(0).all()
        assert grad[0, :, :3].ne(0).any() and grad[0, :, 5:7].ne(0).any()


def test_mask_is_made_once_for_the_layers_of_a_micro_batch() -> None:
    made = []
    once = OncePerMicroBatch(lambda ids: made.append(ids) or len(made))
    other = IDS.clone()
    assert [once(IDS), once(IDS), once(other), once(other), once(IDS)] == [1, 1, 2, 2, 3]


def config(**changed: object) -> SimpleNamespace:
    return SimpleNamespace(**NEEDED | changed)


def test_megatrons_layout_goes_in_and_comes_out() -> None:
    q, k, v = (t.detach().permute(2, 0, 1, 3) for t in tensors(torch.float32))  # [s, b, n, d]
    module = BranchAttention(config(), 1, causal=None)
    found = module(q, k, v, IDS, attn_mask_type=None)
    assert found.shape == (8, 2, 4 * 32)
    whole = masked_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), IDS)
    assert torch.equal(found.view(8, 2, 4, 32).permute(1, 2, 0, 3), whole)


def test_rows_without_branches_keep_the_kernel_of_the_spec() -> None:
    asked = []

    def kernel(**built: object) -> object:
        return lambda *args, **named: asked.append((built["layer_number"], named)) or args[0]

    spec = SimpleNamespace(
        submodules=SimpleNamespace(
            self_attention=SimpleNamespace(submodules=SimpleNamespace(core_attention=kernel))
        )
    )
    block = with_branch_attention(SimpleNamespace(layer_specs=[spec, spec]), keep_causal=True)
    build = block.layer_specs[1].submodules.self_attention.submodules.core_attention
    module = build(config=config(), layer_number=3)
    q, k, v = (t.detach().permute(2, 0, 1, 3) for t in tensors(torch.float32))
    assert module(q, k, v, None, attn_mask_type="causal") is q
    assert asked == [(3, {"attn_mask_type": "causal"})]
    module(q, k, v, IDS)
    assert len(asked) == 1


@pytest.mark.parametrize("changed", [{"attention_dropout": 0.1}, {"context_parallel_size": 2}])
def test_what_has_no_meaning_here_is_refused_by_name(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        BranchAttention(config(**changed), 1, causal=None)
