"""Save, go on, load, go on: the same weights, bit for bit; and with FP8 state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gpu_tasks
import pytest
import tasks
import test_fp8
import torch
from workers import Context

from megatron_sip import checkpoint
from megatron_sip.learner import Learner
from megatron_sip.types import TrainRows, TrainState

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]


def save(ctx: Context, learner: Learner, folder: Path, identity: dict[str, object]) -> None:
    checkpoint.save(
        folder,
        policy=learner.policy,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
        state=TrainState(2, 16, 2, {}, {}),
        identity=identity,
    ).finish()


def load(ctx: Context, learner: Learner, folder: Path, identity: dict[str, object]) -> None:
    found = checkpoint.find_verified(folder, identity=identity, ranks=ctx.ranks)
    checkpoint.load(
        found, policy=learner.policy, optimizer=learner.optimizer, scheduler=learner.scheduler
    )


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().float().cpu().clone() for p in learner.policy.module.parameters()]


def go_on_twice(ctx: Context, folder: Path, name: str) -> dict[str, object]:
    """Two steps, a checkpoint, two more; and the last two again in a learner of other weights."""
    case = gpu_tasks.case(name)
    identity = tasks.identity_of(case.model)
    batches = tasks.shared_batches(ctx, case)
    _, reference = tasks.module_with_weights(ctx, case.model, seed=2)

    def steps(learner: Learner) -> None:
        for _ in range(2):
            learner.learn(
                batches, case.objective, reference=reference, version=0, fresh_reference=False
            )

    first, second = (tasks.build_learner(ctx, case.model, seed=seed) for seed in (1, 9))
    start = weights(first)
    steps(first)
    save(ctx, first, folder, identity)
    saved = weights(first)
    steps(first)
    load(ctx, second, folder, identity)
    loaded = weights(second)
    steps(second)

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    return {
        "moved": not same(start, saved) and not same(saved, weights(first)),
        "loaded": same(saved, loaded),
        "went on": same(weights(first), weights(second)),
        "proved": (first._proved, second._proved),  # the first update gave the same bits twice
    }


@pytest.mark.parametrize("name", ["dpo_mbs2", "dpo_mbs2_shared", "grpo_tied"])
def test_a_loaded_learner_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    found = gpu_tasks.alone(go_on_twice, tmp_path, name)
    assert found == {"moved": True, "loaded": True, "went on": True, "proved": (True, True)}


@pytest.mark.parametrize("fp8", test_fp8.RECIPES)
def test_fp8_checkpoint_is_loaded_and_learns_on(
    context: Callable[..., Context], tmp_path: Path, fp8: str
) -> None:
    ctx = context("transformer_engine", fp8)
    first, second = test_fp8.learner_of(ctx), test_fp8.learner_of(ctx)
    batches: list[TrainRows] = test_fp8.rows(test_fp8.NLL, ctx.platform)

    def step(learner: Learner) -> float:
        means, _ = learner.learn(
            batches, test_fp8.NLL, reference=None, version=0, fresh_reference=False
        )
        return means["loss"][0]

    identity = tasks.identity_of(test_fp8.MODEL)
    step(first)
    save(ctx, first, tmp_path, identity)
    load(ctx, second, tmp_path, identity)
    saved = zip(weights(first), weights(second), strict=True)
    assert all(torch.equal(a, b) for a, b in saved)
    losses = step(first), step(second)
    print(
        f"{fp8}: loss after the checkpoint {losses[0]:.6f}, in the loaded learner {losses[1]:.6f}"
    )
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
