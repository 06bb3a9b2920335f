"""`PREFIX.partial`: where new parts lie until all of them can be published."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sip.data.folder_lock import locked_folder
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
    with locked_folder(folder):
        if (folder / _JOURNAL).is_file():
            raise ValueError(
                f"{folder} holds an unfinished run of tools/preprocess_data.py; finish it with "
                "--resume, or remove the folder"
            )
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(prefix: Path) -> None:
    """Raises: ValueError if a part of a dataset of this name exists."""
    for suffix in PARTS:
        path = part_path(prefix, suffix)
        if path.exists():
            raise ValueError(f"{path} exists already; give another name, or remove that dataset")
