"""Texts of a block of records, each checked, with the reason where it cannot be a document."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from megatron_sip.data.preprocess.records import Block


@dataclass(frozen=True)
class Text:
    """One record. Args: record: line or row, from 1. text: "" if it is unusable. kept: values of
    the keys that are kept. reason: why it cannot be used, "" if it can."""

    record: int
    text: str
    kept: tuple[str | None, ...]
    reason: str


def texts_of(
    block: Block, *, text_key: str, kept: Sequence[str], max_record_bytes: int
) -> Iterator[Text]:
    """The records of a block in order; blank lines of .jsonl are no records.

    Args: text_key: key of the text in JSON, column of a table; dots go deeper.
          kept: keys whose values are wanted as well.
    """
    first = block.cursor.record + 1
    if block.passed_over:
        yield Text(first, "", (), _too_long(block.passed_over, max_record_bytes))
        return
    if isinstance(block.rows, pa.RecordBatch):
        rows = _table_rows(block.rows, text_key, kept)
        records: Iterator[tuple[int, Any]] = enumerate(rows, first)
    elif block.is_json:
        lines = block.rows.removeprefix(codecs.BOM_UTF8 if first == 1 else b"").split(b"\n")
        records = ((n, line) for n, line in enumerate(lines, first) if line.strip())
    else:
        records = iter([(first, block.rows)])
    for number, record in records:
        try:
            text, values = _read(record, block, text_key, kept, max_record_bytes)
        except ValueError as error:
            yield Text(number, "", (), str(error))
        else:
            yield Text(number, text, values, "")


def _read(
    record: Any, block: Block, text_key: str, kept: Sequence[str], limit: int
) -> tuple[str, tuple[str | None, ...]]:
    """(text, kept values). Raises: ValueError with the reason if the record cannot be used."""
    if isinstance(record, tuple):  # of a table
        text, values = record[0], record[1:]
        checked = _checked(text, key=text_key)
        if len(checked.encode()) > limit:
            raise ValueError(_too_long(len(checked.encode()), limit))
        return checked, tuple(map(_kept_value, values))
    if len(record) > limit:
        raise ValueError(_too_long(len(record), limit))
    if not block.is_json:
        try:
            text = record.removeprefix(codecs.BOM_UTF8).decode()
            return _checked(text, key="file"), (None,) * len(kept)
        except UnicodeDecodeError as error:
            raise ValueError(f"not valid UTF-8 ({error})") from None
    try:
        value: Any = orjson.loads(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    text = _checked(_at(value, text_key, required=True), key=text_key)
    return text, tuple(_kept_value(_at(value, key, required=False)) for key in kept)


def _at(value: Any, key: str, *, required: bool) -> Any:
    """Value of a key, dots go deeper; None if there is none and it is not required."""
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            if required:
                raise ValueError(f"no key {part!r} of {key!r}")
            return None
        value = value[part]
    return value


def _checked(text: object, *, key: str) -> str:
    """`text` if it can be a document. Raises: ValueError with the reason if not."""
    if not isinstance(text, str):
        raise ValueError(f"{key} is {type(text).__name__}, but must be a string")
    if not text:
        raise ValueError(f"{key} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half of a surrogate pair") from None
    return text


def _kept_value(value: Any) -> str | None:
    """A kept value as a string; what is no string is written as JSON."""
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value, default=str).decode()


def _too_long(found: int, limit: int) -> str:
    return f"{found} bytes are more than --max-record-mb allows ({limit})"


def _table_rows(
    batch: pa.RecordBatch, text_key: str, kept: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """(text, kept values) of each row; a text that is no UTF-8 comes as bytes."""
    for row in range(len(batch)):
        yield tuple(_cell(batch, key, row) for key in (text_key, *kept))


def _cell(batch: pa.RecordBatch, key: str, row: int) -> Any:
    """Value of a column at a row; bytes for a string that is no UTF-8."""
    try:
        return batch.column(key)[row].as_py()
    except UnicodeDecodeError:
        return b""
