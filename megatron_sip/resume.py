"""Going on with a run that was stopped or killed: what is put back.

The steps after the checkpoint (before the first one: after the start) whose pools are committed are
learned again from those pools, so that nothing is asked or paid for twice; from there the run is
live.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sip import checkpoint, checkpoint_files
from megatron_sip.model import frozen_copy
from megatron_sip.parallel import broadcast_object
from megatron_sip.pool_store import num_committed
from megatron_sip.step import Run


def restore(run: Run) -> None:
    """Put the latest checkpoint into a run that has just been built; every rank calls it.

    Raises: ValueError if a file is damaged, or if data or tokenizer are not those of the run.
    """
    run_dir, learner, ranks = Path(run.config.run.dir), run.learner, run.ranks
    if ranks.is_main:
        checkpoint_files.remove_incomplete(run_dir)
    last = checkpoint_files.find_last(run_dir)
    folder = checkpoint.find_verified(last, identity=run.identity, ranks=ranks)
    state = checkpoint.read_state(folder)
    for name, digest in run.state.digests.items():
        if state.digests.get(name) != digest:
            raise ValueError(
                f"--resume: {name} has digest {digest}, the run was made with "
                f"{state.digests.get(name)}; give the same data and tokenizer"
            )
    if run.config.run.task == "sip":
        run.start_policy = _frozen(run, 0)
    if state.reference_version >= 0:
        first = state.reference_version == 0
        run.reference = run.start_policy if first else _frozen(run, state.reference_version)
    checkpoint.load(
        folder,
        policy=learner.policy,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
    )
    run.state = state
    run.replay_until = broadcast_object(num_committed(run_dir / "pools", first=state.step))


def _frozen(run: Run, version: int) -> Any:
    """A frozen module with the weights of an earlier policy version; the policy gets them too."""
    policy = run.learner.policy
    folder = checkpoint_files.weights_folder(Path(run.config.run.dir), version)
    checkpoint.load_weights(folder, module=policy.module, identity=run.identity, ranks=run.ranks)
    return frozen_copy(policy, run.config, run.platform, vocab_size=run.vocab_size)
