"""What goes from the reader to a worker: a block of records, and the place in the input.

Imports little: a worker starts in a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on.

    Args: source: index of the file. offset: bytes of text (after decompression) or rows read of
          it. record: records read of it, lines for .jsonl.
    """

    source: int = 0
    offset: int = 0
    record: int = 0


@dataclass(frozen=True)
class Block:
    """Some records of one file, one after another.

    Args: cursor: where the first begins. end: where the next block begins. rows: lines of JSON,
          the bytes of one text file, or columns of a table. passed_over: bytes of a record over the
          limit, which is the only one of its block and not in `rows`; 0: none. input_bytes: of the
          file, read for this block. is_json: `rows` are lines of JSON.
    """

    cursor: Cursor
    end: Cursor
    rows: bytes | pa.RecordBatch
    passed_over: int
    input_bytes: int
    is_json: bool = False
