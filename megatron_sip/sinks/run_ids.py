"""Ids under which services know this run, kept in run.dir/sinks.json for when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sip.publish import atomic_write


def _path(run_dir: Path) -> Path:
    return run_dir / "sinks.json"


def read_id(run_dir: Path, place: str) -> str | None:
    """The run's id at a place (service, server, project), None if it was never there.

    Raises: ValueError if the file is damaged.
    """
    path = _path(run_dir)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text()).get(place)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and the services get a new run"
        ) from None


def keep_id(run_dir: Path, place: str, run_id: str) -> None:
    """Remember the id."""
    path = _path(run_dir)
    ids = json.loads(path.read_text()) if path.exists() else {}
    atomic_write(path, (json.dumps(ids | {place: run_id}, indent=1) + "\n").encode())
