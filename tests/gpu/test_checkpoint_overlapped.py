"""A checkpoint written while the GPU learns on holds the state at the save, and goes on from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import checkpoint_tasks
import gpu_tasks
import pytest
import tasks
import torch
from workers import Context

from megatron_sip import checkpoint, checkpoint_files
from megatron_sip.learner import Learner
from megatron_sip.types import TrainState

pytestmark = pytest.mark.gpu
CASE = gpu_tasks.case("nll")


def save(learner: Learner, run_dir: Path, step: int) -> checkpoint.Pending:
    return checkpoint.save(
        run_dir,
        policy=learner.policy,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
        state=TrainState(step, step, step, {}, {}),
        identity=tasks.identity_of(CASE.model),
        asynchronous=True,
    )


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().cpu().clone() for p in learner.policy.module.parameters()]


def test_what_is_written_is_the_state_at_the_save(
    context: Callable[..., Context], tmp_path: Path
) -> None:
    ctx = context("local")
    first, second = (tasks.build_learner(ctx, CASE.model, seed=seed) for seed in (1, 9))
    batches = tasks.shared_batches(ctx, CASE)

    def step(learner: Learner) -> None:
        learner.learn(batches, CASE.objective, reference=None, version=0, fresh_reference=False)

    step(first)
    save(first, tmp_path, 1).finish()
    saved = weights(first)
    with checkpoint_tasks.held_back() as go:
        pending = save(first, tmp_path, 2)
        step(first)
        torch.cuda.synchronize()
        assert pending.writing and not checkpoint_files.is_complete(pending.folder)
        go.set()
        pending.finish()
    digests = [
        json.loads((checkpoint_files.step_folder(tmp_path, n) / "manifest.json").read_text())[
            "files"
        ]
        for n in (1, 2)
    ]
    assert digests[0]["__0_0.distcp"] == digests[1]["__0_0.distcp"]
    folder = checkpoint.find_verified(
        tmp_path, identity=tasks.identity_of(CASE.model), ranks=ctx.ranks
    )
    checkpoint.load(
        folder, policy=second.policy, optimizer=second.optimizer, scheduler=second.scheduler
    )
    assert all(torch.equal(a, b) for a, b in zip(saved, weights(second), strict=True))
    step(second)
    moved = zip(weights(first), saved, strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)
    for a, b in zip(weights(first), weights(second), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
