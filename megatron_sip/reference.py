"""The policy that the present one is compared with: when it is taken, kept and put back.

    frozen     a copy of the policy as it was when the first stage that needs one began
    snapshot   the same, taken anew at each multiple of `reference.interval` steps
    rollout    no copy: the log-probs that the engine gave with the rollouts

A copy that a checkpoint names is saved beside it, before it; copies in between never touch a disk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sip.checkpoint import save_weights
from megatron_sip.config_objective import Objective, SnapshotReference, reference_kind
from megatron_sip.learner import ENGINE
from megatron_sip.model import frozen_copy

if TYPE_CHECKING:
    from megatron_sip.step import Run


def take_reference(run: Run, settings: Objective) -> None:
    """Take what the next step's objective is compared with, where there is none or a newer is due.

    Every rank calls it. A snapshot is due whatever stage the step is in: after the first one, when
    it is taken is a function of the step alone.
    """
    run.fresh_reference = False
    kind = reference_kind(run.config.reference, settings)
    if kind == "rollout":
        run.reference = ENGINE
    elif snapshot_due(run) or (kind != "none" and run.reference is None):
        run.reference = None  # frees the last one
        run.reference = _copy_of_policy(run)
        run.state = replace(run.state, reference_version=run.state.policy_version)
        run.fresh_reference = run.config.platform.fp8 is None  # FP8 history moves between passes


def snapshot_due(run: Run) -> bool:
    """Whether the reference there is must be taken anew before the next step."""
    settings = run.config.reference
    if run.reference is None or not isinstance(settings, SnapshotReference):
        return False
    return run.state.step % settings.interval == 0


def scored_by_a_model(run: Run, settings: Objective) -> bool:
    """Whether the reference takes a forward pass of its own."""
    return reference_kind(run.config.reference, settings) in ("frozen", "snapshot")


def save_reference(run: Run) -> None:
    """Write the copy, if there is one, so that a checkpoint may name it; every rank calls it."""
    if run.state.reference_version >= 0:
        save_weights(
            Path(run.config.run.dir),
            run.state.reference_version,
            module=run.reference,
            identity=run.identity,
        )


def _copy_of_policy(run: Run):
    """A frozen copy of the policy; the start policy itself while the two are equal."""
    if run.start_policy is not None and run.state.policy_version == 0:
        return run.start_policy
    run.learner.policy.ddp.start_param_sync(force_sync=True)
    return frozen_copy(run.learner.policy, run.config, run.platform, vocab_size=run.vocab_size)
