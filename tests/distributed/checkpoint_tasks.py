"""Checkpoints written while the policy learns on, that cannot be written, or that hold code."""

from __future__ import annotations

import os
import pickle
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cases
import tasks
from workers import Context

from megatron_sip import checkpoint, checkpoint_files, checkpoint_writing
from megatron_sip.learner import Learner
from megatron_sip.types import TrainState

CASE = cases.CASES["nll"]
FOREIGN = ("os", "posix", "subprocess", "builtins", "shutil")


def step(ctx: Context, learner: Learner) -> None:
    learner.learn(
        tasks.shared_batches(ctx, CASE), CASE.objective, reference=None, version=0,
        fresh_reference=False,
    )  # fmt: skip


def save(ctx: Context, learner: Learner, run_dir: Path, number: int) -> checkpoint.Pending:
    return checkpoint.save(
        run_dir,
        policy=learner.policy,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
        state=TrainState(number, 8 * number, number, {}, {}),
        identity=tasks.identity_of(CASE.model),
        asynchronous=True,
    )


def exported(ctx: Context, learner: Learner) -> tasks.Tensors:
    return tasks.export(ctx, learner.policy, CASE.model)


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """No byte is written until the event is set."""
    writer: Any = checkpoint_writing.Writer
    go, write = threading.Event(), writer._write

    def wait_and_write(self: Any, *arguments: Any) -> str:
        assert go.wait(60)
        return write(self, *arguments)

    writer._write = wait_and_write
    try:
        yield go
    finally:
        writer._write = write


def overlapped(ctx: Context, run_dir: Path) -> dict[str, Any]:
    """One state saved twice: before the next steps, and while they are made."""
    learner = tasks.build_learner(ctx, CASE.model)
    step(ctx, learner)
    save(ctx, learner, run_dir, 1).finish()
    saved = exported(ctx, learner)
    with held_back() as go:
        pending = save(ctx, learner, run_dir, 2)
        for _ in range(2):
            step(ctx, learner)
        writing = pending.writing
        found = checkpoint_files.find(run_dir).name, checkpoint_files.is_complete(pending.folder)
        go.set()
        pending.finish()
    learned = exported(ctx, learner)
    return {"writing": writing, "before": found, "after": checkpoint_files.find(run_dir).name,
            "saved": saved, "learned": learned}  # fmt: skip


def loaded(ctx: Context, run_dir: Path, number: int, steps: int) -> dict[str, Any]:
    """Weights of a checkpoint, and those after more steps with its optimizer and schedule."""
    learner = tasks.build_learner(ctx, CASE.model, seed=9)
    folder = checkpoint.find_verified(
        checkpoint_files.step_folder(run_dir, number),
        identity=tasks.identity_of(CASE.model), ranks=ctx.ranks,
    )  # fmt: skip
    checkpoint.load(
        folder, policy=learner.policy, optimizer=learner.optimizer, scheduler=learner.scheduler
    )
    first = exported(ctx, learner)
    for _ in range(steps):
        step(ctx, learner)
    return {"saved": first, "learned": exported(ctx, learner)}


def full_disk(ctx: Context, run_dir: Path, largest: int) -> dict[str, Any]:
    """A checkpoint, and one that cannot be written.

    Args: largest: bytes that a file may have; 0: it may have all, but reads as something else.
    """
    learner = tasks.build_learner(ctx, CASE.model)
    step(ctx, learner)
    save(ctx, learner, run_dir, 1).finish()
    digest_of = checkpoint_writing.digest_of
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    elif ctx.ranks.rank == ctx.ranks.world_size - 1:
        checkpoint_writing.digest_of = lambda path, from_disk: "0" * 32
    try:
        pending = save(ctx, learner, run_dir, 2)
        pending.finish()
        return {"error": "none"}
    except checkpoint.SaveFailed as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoint_writing.digest_of = digest_of
    latest = checkpoint_files.find(run_dir)
    if ctx.ranks.is_main:
        checkpoint_files.verify(latest, tasks.identity_of(CASE.model))
        checkpoint_files.remove_incomplete(run_dir)
    left = sorted(p.name for p in (run_dir / "checkpoints").iterdir()) if ctx.ranks.is_main else []
    return {"error": said, "latest": latest.name, "left": left}


def unguarded(ctx: Context, folder: Path) -> dict[str, Any]:
    """What Megatron-Core does with a folder that nothing has looked at before."""
    found: list[Any] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.system", "subprocess.Popen"):
            found.append(event)
        if event == "pickle.find_class" and arguments[0] in FOREIGN:
            found.append(arguments)

    sys.addaudithook(hook)  # of this task's process alone
    _, module = tasks.module_with_weights(ctx, CASE.model, seed=9)
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        checkpoint._load_model(folder, module)
    except (ValueError, pickle.UnpicklingError) as error:
        return {"error": f"{type(error).__name__}: {error}", "found": found}
    return {"error": "none", "found": found}
