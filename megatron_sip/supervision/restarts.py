"""torchrun's restarts: whether one belongs to the run in run.dir, and what it does there.

torchrun starts all ranks anew when one died (`--max-restarts`). `run.dir/launch.json` names the
torchrun that the run belongs to, so that its restarts, and no other start, go on without --resume;
and the reason why a run ended for good, which no restart would change.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.checkpoint_files import find_last
from megatron_sip.publish import atomic_write
from megatron_sip.serving.sessions import start_time
from megatron_sip.supervision import run_lock
from megatron_sip.supervision.heartbeat import culprits, read_records

FILE = "launch.json"
RECORDS = "ranks"
KEPT = (FILE, RECORDS, run_lock.FILE, "logs", "servers")


@dataclass(frozen=True)
class Launch:
    """The torchrun that started this process."""

    owner: str
    attempt: int
    """Restarts before this one."""
    max_restarts: int
    peers: tuple[int, ...]
    """Ranks on this host."""

    @property
    def heir(self) -> int:
        """The process that starts this one anew if it dies; 0: none does."""
        return os.getppid() if self.attempt < self.max_restarts else 0


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun's variables say; without them a launch of one process."""
    rank, local = (int(environment.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    owner = environment.get("TORCHELASTIC_RUN_ID", "none")
    if owner == "none":  # not named: torchrun's process, where there is but one
        parent = os.getppid()
        owner = f"{socket.gethostname()}:{parent}:{start_time(parent)}"
        if here != int(environment.get("WORLD_SIZE", "1")):
            owner = ":".join(environment.get(x, "") for x in ("MASTER_ADDR", "MASTER_PORT"))
    return Launch(
        owner,
        int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")),
        tuple(range(rank - local, rank - local + here)),
    )


@dataclass(frozen=True)
class Left:
    """What an earlier attempt of the same launch left in run.dir."""

    begun: bool = False
    """The folder is ours, whatever it holds."""
    resumable: bool = False
    finished: bool = False
    failure: str = ""
    """Why the run ended for good."""


def what_is_left(run_dir: Path, launch: Launch) -> Left:
    """Nothing for a first attempt, or where the folder is another launch's."""
    known = read_launch(run_dir)
    if launch.attempt == 0 or known.get("owner") != launch.owner:
        return Left()
    try:
        find_last(run_dir)
        resumable = True
    except ValueError:
        resumable = False
    finished = (run_dir / "summary.json").is_file()
    return Left(True, resumable, finished, known.get("failure", ""))


def read_launch(run_dir: Path) -> dict[str, str]:
    try:
        return json.loads((run_dir / FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def claim(run_dir: Path, launch: Launch) -> None:
    """Note whose run this is; rank 0 calls it, before it writes anything else there."""
    atomic_write(run_dir / FILE, json.dumps({"owner": launch.owner}).encode())


def note_failure(run_dir: Path, launch: Launch, reason: str) -> None:
    """The run ended for a reason that a restart does not change; any rank may say it."""
    known = read_launch(run_dir)
    if known.get("owner") == launch.owner and not known.get("failure"):
        atomic_write(run_dir / FILE, json.dumps(known | {"failure": reason}).encode())


def clear(run_dir: Path) -> None:
    """Remove what an attempt left that did not come as far as its first checkpoint; logs stay."""
    for path in run_dir.iterdir():
        if path.name in KEPT:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def what_happened(run_dir: Path, launch: Launch) -> str:
    """One line about this restart and who caused it; "" if this is no restart."""
    if launch.attempt == 0:
        return ""
    found = culprits(read_records(run_dir / RECORDS, attempt=launch.attempt - 1))
    said = [f"{r} " + (f"ended: {r.ended}" if r.ended else "died") for r in found]
    reason = "; ".join(said) or "a rank died before it could say where it was"
    return f"restart {launch.attempt} of {launch.max_restarts}: {reason}"
