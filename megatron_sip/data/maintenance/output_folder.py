"""`PREFIX.partial`: where new parts lie until all of them can be published."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sip.data.manifest import PARTS, part_path

_JOURNAL = "journal.json"  # of a run of tools/preprocess_data.py, which can go on with the folder


@contextmanager
def output_folder(prefix: Path) -> Iterator[Path]:
    """Make and lock PREFIX.partial, on the file system of PREFIX; it is removed at the end.

    What a killed run of merge, split or adopt left there is written over.

    Raises: ValueError if another process works there, or an unfinished run of preprocess_data.py
            lies there.
    """
    folder = part_path(prefix, ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _claim(folder, lock)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def refuse_existing(prefix: Path) -> None:
    """Raises: ValueError if a part of a dataset of this name exists."""
    for suffix in PARTS:
        path = part_path(prefix, suffix)
        if path.exists():
            raise ValueError(f"{path} exists already; give another name, or remove that dataset")


def _claim(folder: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())
    except BlockingIOError:
        free = False
    if not free:
        raise ValueError(
            f"{folder}: another process is making this dataset; wait for it, or give another name"
        )
    if (folder / _JOURNAL).is_file():
        raise ValueError(
            f"{folder} holds an unfinished run of tools/preprocess_data.py; finish it with "
            "--resume, or remove the folder"
        )
