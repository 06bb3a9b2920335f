"""Work on a cache's folder as a whole: read every row, verify all files, merge those at rest."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.judge.cache_file import (
    SCHEMA_VERSION,
    Damaged,
    Row,
    create_file,
    open_file,
)
from megatron_sip.judge.cache_folder import (
    SUFFIX,
    cache_paths,
    is_written,
    may_go,
    new_path,
    remove,
    set_aside,
)
from megatron_sip.judge.cache_salvage import salvage
from megatron_sip.publish import atomic_file


@dataclass
class FileState:
    """What one file holds. The counts are right when all rows were read."""

    path: Path
    version: int = 0  # of the schema; 0: nothing is there yet, or damaged
    rows: int = 0
    damaged_rows: int = 0  # not what was written; of a damaged file those that show
    problem: str = ""  # why SQLite cannot read it; "": it can
    written: bool = False  # by a living process

    @property
    def whole(self) -> bool:
        return not self.problem and not self.damaged_rows


@dataclass(frozen=True)
class MergeCounts:
    """What a merge did."""

    files: int  # that are now in one
    rows: int  # that it holds
    left: tuple[Path, ...]  # in use, or of another host
    set_aside: tuple[Path, ...]  # damaged; what could be read is in the merged file
    merged: Path | None  # None: there was nothing to merge


def read_rows(state: FileState, *, check: bool) -> Iterator[Row]:
    """All credible rows of `state.path`, counted in `state`; a row may come twice.

    Args:   check: see `open_file`; left out for a file in use.
    Raises: FileNotFoundError; ValueError as `open_file`.
    """
    state.written = is_written(state.path)
    try:
        file = open_file(state.path, check=check and not state.written)
        if file is None:
            return
        state.version = file.version
        try:
            yield from _counted(file.rows(), state)
        finally:
            file.close()
    except (Damaged, sqlite3.DatabaseError) as error:
        state.problem, state.rows, state.damaged_rows = str(error), 0, 0
        yield from _counted(salvage(state.path), state)


def verify(folder: Path) -> list[FileState]:
    """Read all files whole; nothing is changed, but what a killed writer left half done goes.

    Raises: ValueError if there is no folder, or as `open_file`.
    """
    states = [FileState(path) for path in cache_paths(folder)]
    for state in states:
        for _ in read_rows(state, check=True):
            pass
    return states


def merge(folder: Path, *, other_hosts: bool = False, max_bytes: int | None = None) -> MergeCounts:
    """Make one file of all whose process is dead.

    The new file is written under a hidden name, synced, renamed; only then the old ones go, so a
    kill at any instant loses nothing. Running processes keep what they have open.

    Args:   other_hosts: also files that another host's processes made; none of them may run.
            max_bytes: of keys and values; the rows that were stored first are left out.
    Raises: ValueError if there is no folder, if another merge runs, or as `open_file`.
    """
    paths = cache_paths(folder)
    with _alone(folder):
        states = [FileState(path) for path in paths if may_go(path, other_hosts=other_hosts)]
        left = tuple(path for path in paths if path not in {state.path for state in states})
        if not states or (max_bytes is None and len(states) == 1 and _is_merged(states[0])):
            return MergeCounts(0, sum(s.rows for s in states), left, (), None)
        target = new_path(folder)
        with atomic_file(target) as temporary:
            rows = _write(temporary, states, max_bytes)
        aside = [path for s in states if not s.whole and (path := set_aside(s.path)) is not None]
        for state in states:
            if state.whole:
                remove(state.path)
    return MergeCounts(len(states), rows, left, tuple(aside), target)


def _write(path: Path, states: list[FileState], max_bytes: int | None) -> int:
    """All rows, or the newest, into a new file. Returns: how many those are."""
    with closing(create_file(path, journal="OFF")) as file:
        for state in states:
            file.insert(read_rows(state, check=True))
        if max_bytes is not None:
            file.keep_newest(max_bytes)
        return file.count()


def _is_merged(state: FileState) -> bool:
    for _ in read_rows(state, check=True):
        pass
    return state.whole and state.version == SCHEMA_VERSION


def _counted(rows: Iterator[Row | None], state: FileState) -> Iterator[Row]:
    for row in rows:
        if row is None:
            state.damaged_rows += 1
        else:
            state.rows += 1
            yield row


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other merges away, and clear what a killed one left."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob(f".*{SUFFIX}.*.tmp"):
            path.unlink(missing_ok=True)
        yield
    except BlockingIOError:
        raise ValueError(f"{folder} is being merged by another process; wait for it") from None
    finally:
        os.close(descriptor)
