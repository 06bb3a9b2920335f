"""Verdicts and rewrites by content, kept across runs: what was paid for once is never asked again.

A folder holds one SQLite file per writing process, so no two processes ever write one file; all
are read together. Values are JSON. Files need a local disk. A row is stored when `put` returns:
it survives a kill of the process. What a damaged file still holds is copied to this process's own
file, and the damaged one is set aside as NAME.damaged if nobody writes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_sip.judge.cache_file import (
    CacheFile,
    Damaged,
    Paid,
    Row,
    create_file,
    is_damage,
    new_row,
    open_file,
)
from megatron_sip.judge.cache_folder import (
    WriterLock,
    cache_paths,
    is_written,
    may_go,
    new_path,
    set_aside,
)
from megatron_sip.judge.cache_salvage import salvage
from megatron_sip.publish import sync

log = logging.getLogger(__name__)
MANY_FILES = 200


def content_key(parts: dict[str, Any]) -> str:
    """Digest of the canonical JSON of `parts`, 64 hex digits.

    Args:   parts: all that the answer depends on (kind, prompt and model digests, parameters,
            full input, vote). Key order does not matter.
    Raises: ValueError if a number is not finite, TypeError if a value is not JSON.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


class Cache:
    """Key-value store of one folder; this process appends to its own file only."""

    def __init__(self, folder: Path) -> None:
        """Open what is there, and repair what is damaged.

        Raises: ValueError naming the file if it has another schema version or cannot be opened.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._own: CacheFile | None = None
        self._lock: WriterLock | None = None
        self._others: dict[Path, CacheFile] = {}
        self._given_up: set[Path] = set()  # damaged, saved as far as possible, not to be moved
        self.num_damaged = 0  # rows that were asked for and not credible
        self.refresh()
        if len(self._others) > MANY_FILES:
            log.warning(
                "%s holds %d files, each of which a miss looks through; make them one with "
                "tools/judge_cache.py merge %s", folder, len(self._others), folder,
            )  # fmt: skip

    def get(self, key: str) -> Any:
        """The stored value, or None where there is none that is whole.

        Rows that other processes stored since are seen, also those of files that are open already;
        files that were made since are found by `refresh`.
        """
        for file in [*([self._own] if self._own else []), *self._others.values()]:
            try:
                value, damaged = file.find(key)
            except sqlite3.DatabaseError as error:
                self._leave(file, error)
                return self.get(key)  # the own file may have the row now
            if damaged:
                self.num_damaged += damaged
                log.warning("%s: the row of key %s is damaged and passed over", file.path, key)
            if value is not None:
                return value
        return None

    def put(self, key: str, value: Any, paid: Paid | None = None) -> None:
        """Store and commit; the value survives a kill of this process from here on.

        A second value of a key does not replace the first; what was paid for it is kept.

        Raises: ValueError if the value is None or holds a number that is not finite; OSError if
                it cannot be stored.
        """
        if value is None:
            raise ValueError("a missing answer is not stored; ask again instead")
        row = new_row(key, json.dumps(value, allow_nan=False), paid)
        try:
            self._opened().insert([row])
        except sqlite3.DatabaseError as error:
            own = self._opened()
            if not is_damage(error):
                raise OSError(f"{own.path}: a verdict cannot be stored ({error})") from error
            self._leave(own, error)
            self._opened().insert([row])

    def refresh(self) -> None:
        """Find files that other processes made since, and let go of those that were merged.

        Raises: as the constructor.
        """
        listed: set[Path] = set()
        again = True
        while again:  # a file that vanished meanwhile has its rows in one that appeared
            before, listed = listed, set(cache_paths(self._folder))
            again = listed != before  # a listing during a merge may hold neither of the two
            for path in sorted(listed - self._others.keys() - self._given_up):
                if self._own is None or path != self._own.path:
                    again |= not self._add(path)
        for path in self._others.keys() - listed:
            self._others.pop(path).close()

    def close(self) -> None:
        """Close all files; the object is of no use afterwards."""
        for file in [self._own, *self._others.values()]:
            if file is not None:
                file.close()
        if self._lock is not None:
            self._lock.release()
        self._own, self._lock, self._others = None, None, {}

    def _add(self, path: Path) -> bool:
        """Open or repair a file. Returns: False if it vanished."""
        try:
            file = open_file(path, check=not is_written(path))
        except FileNotFoundError:
            return False
        except Damaged as damage:
            return self._save(path, reason=str(damage))
        if file is not None:
            self._others[path] = file
        return True

    def _leave(self, file: CacheFile, error: sqlite3.Error) -> None:
        """Go on without a file that SQLite cannot read; its rows are saved if it is damaged.

        Raises: OSError if it is the own one, and the disk or the rights are to blame.
        """
        file.close()
        if file is not self._own:
            del self._others[file.path]
            if is_damage(error):
                self._save(file.path, reason=str(error))
            else:
                log.warning("%s is passed over until the next call: %s", file.path, error)
            return
        lock, self._own, self._lock = self._lock, None, None
        assert lock is not None
        lock.release()
        if not is_damage(error):
            raise OSError(f"{file.path} cannot be read: {error}") from error
        if not self._save(file.path, reason=str(error)):
            self.refresh()  # another process saved the rows

    def _save(self, path: Path, *, reason: str) -> bool:
        """Copy what a damaged file still holds. Returns: False if the file vanished."""
        counts = {"saved": 0, "lost": 0}

        def whole() -> Iterable[Row]:
            for row in salvage(path):
                counts["lost" if row is None else "saved"] += 1
                if row is not None:
                    yield row

        try:
            rows = iter(whole())
            first = next(rows, None)
            if first is not None:
                self._opened().insert(chain([first], rows))
                sync(self._opened().path)
        except FileNotFoundError:
            return False
        moved = set_aside(path) if may_go(path) else None
        if moved is None:
            self._given_up.add(path)
        log.warning(
            "%s is damaged (%s): %d rows saved in %s, %d not readable; it is %s",
            path, reason, counts["saved"], self._own.path.name if self._own else "no file",
            counts["lost"], f"now {moved.name}" if moved else "left, since it may be in use",
        )  # fmt: skip
        return True

    def _opened(self) -> CacheFile:
        """The own file, made when it is first needed."""
        if self._own is None:
            path = new_path(self._folder)
            self._lock = WriterLock(path)
            self._own = create_file(path)
        return self._own
