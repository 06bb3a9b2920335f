"""What is left of a damaged cache file, read past SQLite.

Every page that may be a leaf of a table is taken apart by itself, whatever became of the header,
the index and the pages above it: a row is found if its own bytes (and its overflow pages) are
whole. Rows of version 2 must fit their checksum, so that nothing wrong is ever found. Source of
the format: https://www.sqlite.org/fileformat2.html, sections 1.6 and 2.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_sip.judge.cache_file import PAGE_BYTES, Row, credible_row, row_of_version_1

_LEAF = 0x0D
_OTHER_PAGES = {0x00, 0x02, 0x05, 0x0A}  # overflow, inner pages, leaves of an index
_NUMBER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 7: 8, 10: 0, 11: 0}
_MAX_LOCAL = PAGE_BYTES - 35  # payload of a cell without overflow pages
_MIN_LOCAL = (PAGE_BYTES - 12) * 32 // 255 - 23


def salvage(path: Path) -> Iterator[Row | None]:
    """All rows that are whole; None for each cell of a table's leaf that is not.

    A file of version 1 has no checksums: there a row is whole if its value is JSON.

    Raises: OSError if the disk cannot be read.
    """
    with path.open("rb") as stream:
        newer = any(columns and credible_row(columns) for columns in _records(stream))
        for columns in _records(stream):
            if columns is not None and not newer and len(columns) == 2:
                yield row_of_version_1(*columns)
            else:
                yield None if columns is None else credible_row(columns)


def _records(stream: IO[bytes]) -> Iterator[list[Any] | None]:
    """The columns of all cells; None for a cell of a leaf that cannot be taken apart."""
    number = 1  # page 1 holds the schema alone
    while True:
        stream.seek(number * PAGE_BYTES)
        page = stream.read(PAGE_BYTES)
        number += 1
        if len(page) < 8:
            return
        if page[0] in _OTHER_PAGES:
            continue
        (cells,) = struct.unpack_from(">H", page, 3)
        slot, first = 8, len(page)
        while slot + 2 <= first:  # the count may be wrong; pointers end where cells begin
            (start,) = struct.unpack_from(">H", page, slot)
            start &= PAGE_BYTES - 1  # as SQLite does
            counted = page[0] == _LEAF and slot < 8 + 2 * cells
            slot += 2
            columns = _record(stream, page, start=start) if 8 <= start < len(page) else None
            if columns is not None:
                first = min(first, start)
            if columns is not None or counted:
                yield columns


def _record(stream: IO[bytes], page: bytes, *, start: int) -> list[Any] | None:
    try:
        size, at = _varint(page, start)
        _, at = _varint(page, at)  # rowid
        payload = _payload(stream, page, at=at, size=size)
        return _columns(payload)
    except (IndexError, struct.error, ValueError):
        return None


def _payload(stream: IO[bytes], page: bytes, *, at: int, size: int) -> bytes:
    """The bytes of a record, those on overflow pages too; less than `size` if some lack."""
    if size <= _MAX_LOCAL:
        local = size
    else:
        local = _MIN_LOCAL + (size - _MIN_LOCAL) % (PAGE_BYTES - 4)
        local = local if local <= _MAX_LOCAL else _MIN_LOCAL
    parts = [page[at : at + local]]
    missing = min(size, os.fstat(stream.fileno()).st_size) - local  # pages may form a ring
    following = page[at + local : at + local + 4]
    while missing > 0 and len(following) == 4:
        (number,) = struct.unpack(">I", following)
        stream.seek(max(number - 1, 0) * PAGE_BYTES)
        more = stream.read(PAGE_BYTES)
        following, part = more[:4], more[4 : 4 + missing]
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _columns(payload: bytes) -> list[Any]:
    """A record's values; as many as version 2 has if anything is odd, None for what lacks.

    Those may be right in part, which the checksum tells.
    """
    end, at = _varint(payload, 0)
    body, columns, odd = end, [], end > len(payload)
    while at < min(end, len(payload)):
        kind, at = _varint(payload, at)
        width = 0 if kind in (0, 8, 9) else _NUMBER_BYTES.get(kind, (kind - 12) // 2)
        odd |= kind in (10, 11) or body + width > len(payload)
        columns.append(_value(payload[body : body + width], kind=kind))
        body += width
    if odd or at != end or body != len(payload):
        columns = (columns + [None] * len(Row._fields))[: len(Row._fields)]
    return columns


def _value(data: bytes, *, kind: int) -> Any:
    """Args: kind: the serial type, which tells the type and `len(data)`, unless bytes lack."""
    if kind in (0, 10, 11):
        return None
    if kind in (8, 9):
        return kind - 8
    if kind == 7:
        return struct.unpack(">d", data)[0] if len(data) == 8 else None
    if kind < 12:
        return int.from_bytes(data, "big", signed=True)
    return data.decode(errors="replace") if kind % 2 else data


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number of up to 64 bits, offset behind it). Raises: IndexError at the end of the data."""
    value = 0
    for i in range(at, at + 8):
        value = value << 7 | data[i] & 0x7F
        if data[i] < 0x80:
            return value, i + 1
    return value << 8 | data[at + 8], at + 9
