"""Checkpoints of models whose state is spread otherwise than a plain model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import tasks
from workers import Context

from megatron_sip import checkpoint
from megatron_sip.learner import Learner
from megatron_sip.types import TrainState


def steps(ctx: Context, learner: Learner, case: cases.Case, count: int) -> None:
    for _ in range(count):
        _, reference = tasks.module_with_weights(ctx, case.model, seed=2)
        learner.learn(
            tasks.shared_batches(ctx, case), case.objective, reference=reference, version=0,
            fresh_reference=False,
        )  # fmt: skip


def saved(ctx: Context, names: tuple[str, ...], root: Path) -> dict[str, Any]:
    """Each case after one step, which is saved, and after two more."""
    found = {}
    for name in names:
        case = cases.FAMILIES[name]
        learner = tasks.build_learner(ctx, case.model)
        steps(ctx, learner, case, 1)
        checkpoint.save(
            root / name,
            policy=learner.policy,
            optimizer=learner.optimizer,
            scheduler=learner.scheduler,
            state=TrainState(1, 8, 1, {}, {}),
            identity=tasks.identity_of(case.model),
        ).finish()
        found[name] = after_two_more(ctx, learner, case)
    return found


def loaded(ctx: Context, names: tuple[str, ...], root: Path) -> dict[str, Any]:
    """The same from the checkpoints, in this layout."""
    found = {}
    for name in names:
        case = cases.FAMILIES[name]
        learner = tasks.build_learner(ctx, case.model, seed=9)
        folder = checkpoint.find_verified(
            root / name, identity=tasks.identity_of(case.model), ranks=ctx.ranks
        )
        checkpoint.load(
            folder, policy=learner.policy, optimizer=learner.optimizer, scheduler=learner.scheduler
        )
        found[name] = after_two_more(ctx, learner, case)
    return found


def after_two_more(ctx: Context, learner: Learner, case: cases.Case) -> dict[str, tasks.Tensors]:
    before = tasks.export(ctx, learner.policy, case.model)
    steps(ctx, learner, case, 2)
    return {"saved": before, "learned": tasks.export(ctx, learner.policy, case.model)}
