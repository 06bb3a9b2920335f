"""One SQLite file of the cache: its schema, its rows, what makes a row credible.

Each row carries a checksum of key and value, so that a byte that changed on the disk makes a miss
and never another verdict. Each payment is a row: a key that two processes paid for at once has two
rows, and the earlier one is its value. Files of schema version 1 have key and value alone; they
are read as they are. What is left of a damaged file is found in `cache_salvage`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

SCHEMA_VERSION = 2
PAGE_BYTES = 4096
LOCK_TIMEOUT_S = 30.0
SCHEMAS = {
    1: "CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    2: """CREATE TABLE entries (
  key TEXT NOT NULL, -- digest of all that the answer depends on
  value TEXT NOT NULL, -- JSON
  checksum INTEGER NOT NULL, -- xxh3_64 of key, NUL, value; less 2^63
  stored_unix_s REAL NOT NULL, -- 0: unknown, as of files of schema version 1
  kind TEXT, -- from here on NULL: unknown
  criterion TEXT,
  prompt TEXT,
  model TEXT,
  vote INTEGER,
  prompt_tokens INTEGER,
  completion_tokens INTEGER,
  latency_s REAL,
  run TEXT, -- that paid
  PRIMARY KEY (key, stored_unix_s)
)""",
}
_OLDEST = """DELETE FROM entries WHERE rowid IN (SELECT rowid FROM (
  SELECT rowid, SUM(length(key) + length(CAST(value AS BLOB)))
    OVER (ORDER BY stored_unix_s DESC, rowid DESC) AS up_to_here FROM entries
) WHERE up_to_here > ?)"""
_CHUNK_ROWS = 10_000  # read at a time, so that a living writer waits for a moment only
_ENVIRONMENT = {3, 5, 6, 7, 8, 10, 13, 14}  # PERM BUSY LOCKED NOMEM READONLY IOERR FULL CANTOPEN


class Damaged(Exception):
    """The bytes of a file are not what was written; other copies of its rows may be had."""


@dataclass(frozen=True, kw_only=True)
class Paid:
    """What one stored answer cost, and what it was an answer to."""

    kind: str  # "pairwise", "rewrite", ...
    criterion: str  # "": none
    prompt: str  # name with version; "": none
    model: str
    vote: int  # 0-based repetition
    prompt_tokens: int
    completion_tokens: int
    seconds: float  # latency, from the request to the reply
    run: str  # which paid


class Row(NamedTuple):
    """A row of schema version 2, its columns in order."""

    key: str
    value: str
    checksum: int
    stored_unix_s: float
    kind: str | None
    criterion: str | None
    prompt: str | None
    model: str | None
    vote: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_s: float | None
    run: str | None


_INSERT = f"INSERT OR IGNORE INTO entries VALUES ({', '.join('?' * len(Row._fields))})"


def checksum(key: str, value: str) -> int:
    """xxh3_64 of key and value as a signed number, which is all that SQLite stores."""
    return xxhash.xxh3_64_intdigest(f"{key}\0{value}".encode(errors="surrogatepass")) - 2**63


def new_row(key: str, value: str, paid: Paid | None) -> Row:
    """A row that is stored now. Args: value: JSON."""
    costs = (None,) * 9 if paid is None else astuple(paid)
    return Row(key, value, checksum(key, value), time.time(), *costs)


def credible_row(columns: Iterable[Any]) -> Row | None:
    """What was read as a row of version 2; None unless key and value are what was written.

    Costs have no checksum. One that is not of its column's type is unknown.
    """
    found = tuple(columns)
    if len(found) != len(Row._fields):
        return None
    key, value, digest, stored, *costs = found
    if not (isinstance(key, str) and isinstance(value, str) and digest == checksum(key, value)):
        return None
    kind, criterion, prompt, model, vote, asked, answered, latency, run = costs
    texts = [x if isinstance(x, str) else None for x in (kind, criterion, prompt, model, run)]
    return Row(
        key,
        value,
        digest,
        float(stored) if isinstance(stored, int | float) else 0.0,
        *texts[:4],
        vote=vote if isinstance(vote, int) else None,
        prompt_tokens=asked if isinstance(asked, int) else None,
        completion_tokens=answered if isinstance(answered, int) else None,
        latency_s=float(latency) if isinstance(latency, int | float) else None,
        run=texts[4],
    )


def row_of_version_1(key: Any, value: Any) -> Row | None:
    """The same for a row without checksum and costs; None unless the value is JSON."""
    if not (isinstance(key, str) and isinstance(value, str)) or parsed(value) is None:
        return None
    return Row(key, value, checksum(key, value), 0.0, *(None,) * 9)


def parsed(value: str) -> Any:
    """The value; None if it is no JSON (None itself is never stored)."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file's bytes are to blame, not the disk, the rights or another process."""
    return getattr(error, "sqlite_errorcode", 1) & 0xFF not in _ENVIRONMENT


class CacheFile:
    """An open file. Every method raises sqlite3.DatabaseError if SQLite cannot go on."""

    def __init__(self, path: Path, connection: sqlite3.Connection, *, version: int) -> None:
        self.path, self.version, self._connection = path, version, connection
        # bytes that are no UTF-8 make a wrong checksum, not an error
        connection.text_factory = lambda data: data.decode(errors="replace")

    def find(self, key: str) -> tuple[Any, int]:
        """(earliest credible value or None, rows of that key that are not credible)."""
        columns = "value, checksum" if self.version > 1 else "value, NULL"
        sql = f"SELECT {columns} FROM entries WHERE key = ? ORDER BY rowid"
        damaged = 0
        for value, digest in self._connection.execute(sql, (key,)).fetchall():
            text = value if isinstance(value, str) else ""
            whole = self.version == 1 or digest == checksum(key, text)
            if whole and (answer := parsed(text)) is not None:
                return answer, damaged
            damaged += 1
        return None, damaged

    def rows(self) -> Iterator[Row | None]:
        """All rows in the order of storing; None for one that is not credible."""
        last, chunk = -(2**63), [()]
        sql = "SELECT rowid, * FROM entries WHERE rowid > ? ORDER BY rowid LIMIT ?"
        while chunk:
            chunk = self._connection.execute(sql, (last, _CHUNK_ROWS)).fetchall()
            for rowid, *columns in chunk:
                last = rowid
                yield credible_row(columns) if self.version > 1 else row_of_version_1(*columns)

    def insert(self, rows: Iterable[Row]) -> None:
        """Store and commit all or none; copies of rows that are there are passed over."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(_INSERT, rows)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite ends some by itself
                self._connection.execute("ROLLBACK")
            raise

    def keep_newest(self, max_bytes: int) -> None:
        """Remove the rows that were stored first, until keys and values take `max_bytes`."""
        self._connection.execute(_OLDEST, (max_bytes,))
        self._connection.execute("VACUUM")

    def count(self) -> int:
        """Number of rows."""
        return self._connection.execute("SELECT count(*) FROM entries").fetchone()[0]

    def close(self) -> None:
        self._connection.close()


def create_file(path: Path, *, journal: str = "TRUNCATE") -> CacheFile:
    """A new file; its schema appears in one transaction.

    Args: journal: "OFF" for a file that nobody reads before it is whole.
    """
    connection = sqlite3.connect(path, isolation_level=None, timeout=LOCK_TIMEOUT_S)
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute("PRAGMA synchronous = OFF")  # a commit outlives a kill, not a power cut
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(SCHEMAS[SCHEMA_VERSION])
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    return CacheFile(path, connection, version=SCHEMA_VERSION)


def open_file(path: Path, *, check: bool) -> CacheFile | None:
    """A file for reading; None if its writer died, or is, before its schema stands.

    The file is opened read-write because only then SQLite can roll back what a killed writer
    left half done; `query_only` keeps this process from changing it.

    Args:   check: read it whole and compare table and index (about 2 s for 10^6 rows); a writer
            waits meanwhile.
    Raises: Damaged; FileNotFoundError; ValueError naming the file if it has another schema
            version or cannot be opened.
    """
    try:
        connection = _connect(path)
    except sqlite3.Error as error:
        raise _explained(error, path) from None
    try:
        version = _version(connection, path)
        if version and check:
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise Damaged(" ".join(str(found).split()))
    except sqlite3.Error as error:
        connection.close()
        raise _explained(error, path) from None
    except UnicodeDecodeError as error:  # of a message that quotes the schema
        connection.close()
        raise Damaged(str(error)) from None
    except BaseException:
        connection.close()
        raise
    if version == 0:
        connection.close()
        return None
    return CacheFile(path, connection, version=version)


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode=rw"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCK_TIMEOUT_S)


def _explained(error: sqlite3.Error, path: Path) -> Exception:
    """What an error at opening means."""
    if not path.exists():
        return FileNotFoundError(str(path))
    if is_damage(error):
        return Damaged(str(error))
    return ValueError(
        f"{path} cannot be read as a verdict cache ({error}); see whether it may be read and "
        "written, and how many files may be open (ulimit -n); tools/judge_cache.py merge makes "
        "one file of many"
    )


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Schema version; 0 if nothing is there yet.

    The text of the schema tells the version too, so that a byte that changed in either place is
    not taken for another version.
    """
    connection.execute("PRAGMA query_only = ON")
    connection.text_factory = lambda data: data.decode(errors="replace")
    connection.execute("BEGIN")  # all reads see one state of a file that is being made
    schema = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute("COMMIT")
    if version == 0 and not schema and pages <= 1:
        return 0
    by_text = [v for v, text in SCHEMAS.items() if schema == [(text,)]]
    if by_text == [version]:
        return version
    if by_text or version in SCHEMAS:
        raise Damaged(f"its header says schema version {version}, its table says another")
    raise ValueError(
        f"{path} has cache schema version {version}, this program reads {SCHEMA_VERSION}; "
        "point judge.cache_dir at another folder or move the file away"
    )
