"""Going on with a run that was stopped or killed: what must be the same, and what is put back.

The steps after the checkpoint whose pools are committed are learned again from those pools, so
that nothing is asked or paid for twice; from there the run is live.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sip import checkpoint, checkpoint_files
from megatron_sip.config import Config
from megatron_sip.model import frozen_copy
from megatron_sip.parallel import broadcast_object
from megatron_sip.pool_store import num_committed
from megatron_sip.recipe import flatten, load_config
from megatron_sip.step import Run

FREE = (
    "run.dir", "platform", "parallel", "servers", "checkpoint", "model.init",
    "data.tokenizer", "data.train", "data.validation", "data.test",  # checked by their digests
    "data.micro_batch_size", "evaluation.bootstrap",
    "rollout.concurrency", "rollout.timeout_s", "rollout.weight_transfer", "rollout.bucket_mib",
    "rollout.max_logprob_mismatch",
    "judge.cache_dir", "judge.concurrency", "judge.timeout_s", "judge.max_missing_rate",
    "rewriter.concurrency", "rewriter.timeout_s", "metrics",
)  # fmt: skip


def check_recipe(config: Config) -> None:
    """Whether the run in `run.dir` can go on with this recipe.

    Raises: ValueError if there is no run or no checkpoint, or naming each key that may not change.
    """
    folder = Path(config.run.dir)
    saved = folder / "config.toml"
    if not saved.is_file():
        raise ValueError(
            f"--resume: run.dir {folder} holds no run (config.toml); start it without --resume"
        )
    if not (folder / "checkpoints" / "latest").is_file():
        raise ValueError(
            f"--resume: {folder} has no checkpoint yet; remove the folder and start without "
            "--resume"
        )
    if (folder / "summary.json").is_file():
        raise ValueError(
            f"--resume: {folder} is finished (summary.json); to go further start a new run from "
            "its checkpoint (model.init)"
        )
    was, now = (
        flatten(load_config(saved).model_dump(mode="json")),
        flatten(config.model_dump(mode="json")),
    )
    changed = [
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not _is_free(key)
    ]
    if changed:
        raise ValueError(
            f"--resume: {saved} differs in what must stay: " + "; ".join(changed)
            + "; set it back, or start a new run from this one's checkpoint (model.init)"
        )  # fmt: skip


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE)


def restore(run: Run) -> None:
    """Put the latest checkpoint into a run that has just been built; every rank calls it.

    Raises: ValueError if a file is damaged, or if data or tokenizer are not those of the run.
    """
    run_dir, learner, ranks = Path(run.config.run.dir), run.learner, run.ranks
    if ranks.is_main:
        checkpoint_files.remove_incomplete(run_dir)
    folder = checkpoint.find_verified(run_dir, identity=run.identity, ranks=ranks)
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
    run.replay_until = broadcast_object(num_committed(run_dir / "pools"))


def _frozen(run: Run, version: int) -> Any:
    """A frozen module with the weights of an earlier policy version; the policy gets them too."""
    policy = run.learner.policy
    folder = checkpoint_files.weights_folder(Path(run.config.run.dir), version)
    checkpoint.load_weights(folder, module=policy.module, identity=run.identity, ranks=run.ranks)
    return frozen_copy(policy, run.config, run.platform, vocab_size=run.vocab_size)
