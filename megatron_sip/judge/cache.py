"""Verdicts and rewrites by content, kept across runs: what was paid for once is never asked again.

A folder holds one SQLite file per writing process, so no two processes ever write one file; all
files that are there at the start are read together. Values are JSON. Files need a local disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sqlite3
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
SUFFIX = ".sqlite"
LOCK_TIMEOUT_S = 30.0


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
        """Open what is there.

        Raises: ValueError naming the file if it has another schema version or is no cache.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        self._path = folder / name
        self._own: sqlite3.Connection | None = None
        self._others = []
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            connection = _open_existing(path)
            if connection is not None:
                self._others.append(connection)

    def get(self, key: str) -> Any:
        """The stored value, or None where there is none."""
        for connection in ([self._own] if self._own else []) + self._others:
            row = connection.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return json.loads(row[0])
        return None

    def put(self, key: str, value: Any) -> None:
        """Store and commit; the value survives a kill of this process from here on.

        Raises: ValueError if the value is None or holds a number that is not finite.
        """
        if value is None:
            raise ValueError("a missing answer is not stored; ask again instead")
        text = json.dumps(value, allow_nan=False)
        if self._own is None:
            self._own = _create(self._path)
        self._own.execute("INSERT OR IGNORE INTO entries VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close all files; the object is of no use afterwards."""
        for connection in [self._own, *self._others]:
            if connection is not None:
                connection.close()
        self._own, self._others = None, []


def _create(path: Path) -> sqlite3.Connection:
    """A new file with the schema, in autocommit mode; the schema appears in one transaction."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=LOCK_TIMEOUT_S)
    connection.execute("PRAGMA journal_mode = TRUNCATE")
    connection.execute("PRAGMA synchronous = OFF")  # a commit outlives a kill, not a power cut
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    return connection


def _open_existing(path: Path) -> sqlite3.Connection | None:
    """Another process's file for reading; None if that process died before its schema stood.

    The file is opened read-write because only then SQLite can roll back what a killed writer
    left half done; `query_only` keeps this process from changing it.
    """
    uri = f"{path.resolve().as_uri()}?mode=rw"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCK_TIMEOUT_S)
        connection.execute("PRAGMA query_only = ON")
        connection.execute("BEGIN")  # both reads see one state of a file that is being made
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path} cannot be read as a verdict cache ({error}); move it away"
        ) from None
    if version == 0 and tables == 0:
        connection.close()
        return None
    if version != SCHEMA_VERSION:
        connection.close()
        raise ValueError(
            f"{path} has cache schema version {version}, this program reads {SCHEMA_VERSION}; "
            "point judge.cache_dir at another folder or move the file away"
        )
    return connection
