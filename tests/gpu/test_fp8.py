"""FP8 layers beside bf16 ones: the same function within FP8's rounding, and they learn alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import gpu_tasks
import numpy as np
import pytest
import torch
from workers import Context

from megatron_sip.config import Model, Optimizer
from megatron_sip.config_objective import DpoObjective, NllObjective
from megatron_sip.forward import token_logprobs
from megatron_sip.learner import Learner
from megatron_sip.objectives import picks_of
from megatron_sip.rows import make_micro_batches, row_length
from megatron_sip.types import Candidate, CandidatePool, PoolRewards, SipSample, TrainRows

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]

RECIPES = ["delayed", "tensorwise", "blockwise"]  # mxfp8 needs Blackwell
VOCAB, PREFIX, SUFFIX, POOLS, STEPS = 1024, 192, 64, 16, 20
MODEL = Model(
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=4,
    max_sequence_length=256,
    init_std=0.05,
)
NLL = NllObjective(name="nll", prefix_weight=1.0)
DPO = DpoObjective(name="dpo", beta=0.1)


def rows(objective: Any, platform: Any) -> list[TrainRows]:
    """Two micro-batches of text in which a token says what follows: something to learn."""
    rng = np.random.default_rng(1)
    follows = rng.permutation(VOCAB)

    def ids(count: int) -> np.ndarray:
        chain = [int(rng.integers(VOCAB))]
        for _ in range(count - 1):
            chain.append(int(follows[chain[-1]] if rng.random() < 0.8 else rng.integers(VOCAB)))
        return np.int32(chain)

    pools, rewards = [], []
    for b in range(POOLS):
        sample = SipSample(b, b, 0, ids(PREFIX), ids(SUFFIX))
        none = np.zeros(SUFFIX, np.float32)
        two = tuple(Candidate("rollout", ids(SUFFIX), "o", none, -5, "length") for _ in range(2))
        pools.append(CandidatePool(sample, "p", two, 1.0))
        total, valid = np.float32([0.0, 1.0]), np.ones(2, bool)
        rewards.append(PoolRewards({}, total, valid, 0, valid))
    multiple = platform.token_multiple(tensor_parallel=1, sequence_parallel=False)
    batches = make_micro_batches(
        pools,
        picks_of(pools, rewards, objective, seed=1),
        micro_batch_size=POOLS // 2,
        length=row_length(PREFIX, SUFFIX, multiple),
        multiple=multiple,
        pad=0,
        layout=objective.row_layout,
    )
    device = platform.device
    return [replace(b, **{k: v.to(device) for k, v in vars(b).items()}) for b in batches]


def learner_of(ctx: Context) -> Learner:
    return gpu_tasks.learner_of(ctx, MODEL, VOCAB, Optimizer(lr=1e-3, decay_style="constant"))


@cache
def curve(of: Callable[..., Context], fp8: str | None) -> tuple[torch.Tensor, list[float]]:
    """Log-probs of the first weights, and the loss of each step on one and the same batch."""
    ctx = of("transformer_engine", fp8)
    learner, batches = learner_of(ctx), rows(NLL, ctx.platform)
    scored = batches[0].segment_ids >= 0
    found = token_logprobs(learner.policy.ddp, batches)[0][scored].double().cpu()
    losses = []
    for _ in range(STEPS):
        means, _ = learner.learn(batches, NLL, reference=None, version=0, fresh_reference=False)
        losses.append(means["loss"][0])
    return found, losses


# e4m3 keeps 4 bits: a value is rounded by at most 2^-4, 2.6 % in the mean square; a product of two
# by 3.7 %, and so is a sum of many of either sign. Four products in each of 4 layers add up like a
# random walk: 15 % of what the layers do, to first order. A log-prob may move by twice that share
# of what tells one token's from another's.
SHARE = 2 * 0.15


@pytest.mark.parametrize("fp8", RECIPES)
def test_log_probs_are_those_of_bf16_within_fp8_rounding(
    context: Callable[..., Context], fp8: str
) -> None:
    plain, _ = curve(context, None)
    found, _ = curve(context, fp8)
    moved = (found - plain).square().mean().sqrt().item()
    spread = plain.std().item()
    print(f"{fp8}: log-probs differ from bf16 by {moved:.4f} nats (root mean square); "
          f"tokens differ by {spread:.4f}")  # fmt: skip
    assert 0 < moved <= SHARE * spread


@pytest.mark.parametrize("fp8", RECIPES)
def test_twenty_steps_lower_the_loss_as_in_bf16(context: Callable[..., Context], fp8: str) -> None:
    (_, plain), (_, found) = curve(context, None), curve(context, fp8)
    print(f"bf16 {plain[0]:.4f} -> {plain[-1]:.4f}; {fp8} {found[0]:.4f} -> {found[-1]:.4f}")
    drop = plain[0] - plain[-1]
    assert drop > 0.5
    assert max(abs(a - b) for a, b in zip(plain, found, strict=True)) <= 0.05 * drop


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("fp8", [None, *RECIPES])
def test_margin_of_equal_policy_and_reference(
    context: Callable[..., Context], fp8: str | None, layout: Any
) -> None:
    ctx = context("transformer_engine", fp8)
    objective = DPO.model_copy(update={"row_layout": layout})
    learner, batches = learner_of(ctx), rows(objective, ctx.platform)
    reference = gpu_tasks.copy_of(ctx, learner.policy, MODEL, VOCAB)
    means, _ = learner.learn(
        batches, objective, reference=reference, version=0, fresh_reference=fp8 is None
    )
    total, count = means["objective/margin"]
    print(f"{fp8 or 'bf16'}, {layout}: margin {total / count:.3g} nats of {SUFFIX} tokens")
    if fp8 == "delayed":  # its scales follow the passes before, and each model has its own
        spread = curve(context, None)[0].std().item()
        assert 0 < abs(total / count) <= SHARE * spread * (2 * SUFFIX) ** 0.5
    else:
        assert total == 0.0
