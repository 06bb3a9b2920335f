"""`PREFIX.partial/journal.json`: how far a run has come, so that a killed one can go on.

The journal is replaced atomically after the data it speaks of is on the disk. What was written
after it is cut off when the run goes on, and made again: the result is the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_sip.data.folder_lock import locked_folder
from megatron_sip.data.preprocess.bad_records import BadRecords
from megatron_sip.data.preprocess.records import Cursor
from megatron_sip.data.staged_dataset import Position
from megatron_sip.publish import atomic_write, sync

SCHEMA = 1


@dataclass
class Progress:
    """State of a run between two blocks.

    Args: cursor: where reading goes on. positions: of the staged dataset of each split.
          exact: no fast backend any more. bad_count, bad_places: records left out, and where the
          first of them stand. input_bytes: read so far.
    """

    cursor: Cursor = field(default_factory=Cursor)
    positions: dict[str, Position] = field(default_factory=dict)
    exact: bool = False
    bad_count: int = 0
    bad_places: list[str] = field(default_factory=list)
    input_bytes: int = 0

    def bad_records(self, limit: int) -> BadRecords:
        """What was left out so far."""
        return BadRecords(limit, self.bad_count, list(self.bad_places))


def save(folder: Path, progress: Progress, *, identity: dict[str, Any]) -> None:
    """Write the journal; the data must be on the disk already."""
    content = {"schema_version": SCHEMA, "identity": identity, "progress": asdict(progress)}
    atomic_write(folder / "journal.json", json.dumps(content).encode())


def remove(folder: Path) -> None:
    """Forget how far the run has come, before anything that the journal speaks of is moved."""
    (folder / "journal.json").unlink(missing_ok=True)
    sync(folder)


def load(folder: Path, *, identity: dict[str, Any]) -> Progress | None:
    """The journal of an earlier run, None if it had not come to write one.

    Raises: ValueError naming the first thing that is not as it was.
    """
    path = folder / "journal.json"
    if not path.is_file():
        return None
    remedy = f"give the same, or remove {folder} and begin anew"
    try:
        content = json.loads(path.read_bytes())
        if content["schema_version"] != SCHEMA:
            raise ValueError(f"schema version {content['schema_version']}, this one reads {SCHEMA}")
        was, found = content["identity"], content["progress"]
        found["cursor"] = Cursor(**found["cursor"])
        found["positions"] = {k: Position(**v) for k, v in found["positions"].items()}
        progress = Progress(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {path} cannot be used ({error}); {remedy}") from None
    for key in sorted(was.keys() | identity.keys()):
        if was.get(key) != identity.get(key):
            raise ValueError(
                f"--resume: {key} was {str(was.get(key))[:200]}, is "
                f"{str(identity.get(key))[:200]}; {remedy}"
            )
    return progress


@contextmanager
def working_folder(output_prefix: Path, *, resume: bool) -> Iterator[Path]:
    """PREFIX.partial, locked; removed when all is published, or when nothing in it is worth going
    on from.

    Raises: ValueError if another process works there, or an unfinished run lies there and
            `resume` is not given.
    """
    folder = output_prefix.with_name(output_prefix.name + ".partial")
    with locked_folder(folder):
        try:
            if (folder / "journal.json").is_file() and not resume:
                raise ValueError(
                    f"{folder} holds an unfinished run; give --resume to go on with it, or remove "
                    "it"
                )
            yield folder
            shutil.rmtree(folder)
        except BaseException:
            if not (folder / "journal.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise
