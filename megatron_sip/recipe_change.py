"""Which keys of its recipe a run may change when it goes on. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_sip.checkpoint_files import find_last
from megatron_sip.config import Config
from megatron_sip.recipe import flatten, load_config

FREE = (
    "run.dir", "run.max_gib", "run.keep_pools", "run.max_log_mib",
    "run.hang_timeout_s", "platform", "parallel", "servers", "checkpoint", "model.init",
    "data.tokenizer", "data.train", "data.validation", "data.test",  # checked by their digests
    "data.cache_dir", "data.prefetch_steps", "data.micro_batch_size", "evaluation.bootstrap",
    "rollout.server", "rollout.sync_timeout_s",
    "rollout.concurrency", "rollout.timeout_s", "rollout.weight_transfer", "rollout.bucket_mib",
    "rollout.max_logprob_mismatch", "rollout.max_logprob_mismatch_p99",
    "rollout.max_logprob_mismatch_max", "rollout.max_kl",
    "judge.cache_dir", "judge.concurrency", "judge.timeout_s", "judge.max_missing_rate",
    "judge.outage_patience_s", "judge.limit", "judge.trust",
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
    find_last(folder)
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
