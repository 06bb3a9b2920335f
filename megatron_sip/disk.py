"""What a run may still write, and what of it may go: a quota, old pools, long logs. No torch.

Asked between two steps, so that a run ends with a checkpoint before the disk is full. Nothing goes
that `--resume` needs: pools of the steps after the oldest checkpoint stay.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_sip import checkpoint_files
from megatron_sip.config import Config
from megatron_sip.pool_store import pool_bytes, prune_pools

MARGIN = 2**26  # bytes, for metrics, logs and the file system itself
POOLS = 4  # times what the last step's took: steps differ


def shortage(config: Config, *, step: int, checkpoint: int) -> str:
    """What is full but for one more checkpoint and one more step; "" while there is room.

    Args:   step: steps that are done. checkpoint: bytes of one.
    """
    run_dir = config.run.dir
    needed = round(1.1 * checkpoint) + POOLS * pool_bytes(run_dir, step - 1) + MARGIN
    most = config.run.max_gib
    if most is not None:
        held = folder_bytes(run_dir)
        if held + needed > most * 2**30:
            return (
                f"run.max_gib is {most:g}, run.dir {run_dir} holds {_gib(held)}, and a "
                f"checkpoint and a step take {_gib(needed)}; raise it, or lower "
                "checkpoint.keep_last or run.keep_pools"
            )
    folders = {"run.dir": run_dir}
    if config.judge is not None:
        folders["judge.cache_dir"] = config.judge.cache_dir
    for key, folder in folders.items():
        free = shutil.disk_usage(folder).free if folder.is_dir() else needed
        if free < needed:
            return (
                f"{key} {folder}: {_gib(free)} are free, and a checkpoint and a step take "
                f"{_gib(needed)}; make room"
            )
    return ""


def tidy(config: Config) -> None:
    """Remove what the recipe does not keep; rank 0 calls it after a checkpoint is complete."""
    run_dir, settings = config.run.dir, config.checkpoint
    checkpoint_files.prune(run_dir, keep_last=settings.keep_last, keep_every=settings.keep_every)
    oldest, newest = checkpoint_files.steps_saved(run_dir)
    if config.run.keep_pools is not None:
        prune_pools(run_dir, before=min(oldest, newest - config.run.keep_pools))
    cut_logs(run_dir, limit=config.run.max_log_mib * 2**20)


def cut_logs(run_dir: Path, *, limit: int) -> None:
    """Move what a log longer than `limit` bytes holds to NAME.1, in place of what that held.

    The processes that write it go on at its begin: all of them append.
    """
    for path in (run_dir / "logs").glob("*.log"):
        if path.stat().st_size > limit:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files; one that goes meanwhile counts nothing."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
