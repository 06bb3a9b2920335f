"""The files of a cache's folder: their names, whether a process still writes one, setting aside.

A writer holds a lock on an empty file beside its own, NAME.lock, as long as it lives. The lock is
the kernel's and ends with the process, however that ends; unlike a process number it means the
same in every container of a host. It is not on the file itself, because closing that would drop
SQLite's locks. Files of schema version 1 have no lock; there the process number in the name tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
from pathlib import Path

SUFFIX = ".sqlite"
_VERSION = ".v2"
_NAME = re.compile(
    rf"(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{{8}}(?P<locked>{re.escape(_VERSION)})?"
    + re.escape(SUFFIX)
)


def new_path(folder: Path) -> Path:
    """A name that no other process has."""
    return folder / (
        f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{_VERSION}{SUFFIX}"
    )


def cache_paths(folder: Path) -> list[Path]:
    """All files of the cache, sorted by name. Raises: ValueError if there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the recipe's judge.cache_dir")
    return sorted(p for p in folder.glob(f"[!.]*{SUFFIX}") if p.is_file())


class WriterLock:
    """Tells all others that this process writes a file; taken before the file is made."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError if the file system has no locks."""
        self._path = _lock_path(path)
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def is_written(path: Path) -> bool:
    """Whether a living process may still store rows in a file."""
    try:
        descriptor = os.open(_lock_path(path), os.O_RDONLY)
    except FileNotFoundError:
        return _is_version_1_of_a_living_process(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def may_go(path: Path, *, other_hosts: bool = False) -> bool:
    """Whether a file may be moved or removed, since nobody writes it any more.

    Args: other_hosts: also one whose name has another host's name, which may be out of sight.
    """
    name = _NAME.fullmatch(path.name)
    here = name is None or name["host"] == socket.gethostname()
    return (here or other_hosts) and not is_written(path)


def set_aside(path: Path) -> Path | None:
    """Rename a file to NAME.damaged; None if another process was first."""
    target = path.with_name(f"{path.name}.damaged")
    if target.exists():
        target = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
    try:
        path.rename(target)
    except FileNotFoundError:
        return None
    with contextlib.suppress(FileNotFoundError):
        _journal(path).rename(_journal(target))
    _lock_path(path).unlink(missing_ok=True)
    return target


def remove(path: Path) -> None:
    """Remove a file whose rows are elsewhere, then what belongs to it."""
    for each in (path, _journal(path), _lock_path(path)):
        each.unlink(missing_ok=True)


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.lock")


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def _is_version_1_of_a_living_process(path: Path) -> bool:
    name = _NAME.fullmatch(path.name)
    if name is None or name["locked"] or name["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(name["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
