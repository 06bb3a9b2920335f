"""Texts of input files one after another, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_sip.data.preprocess.bad_records import BadRecords
from megatron_sip.data.preprocess.blocks import read_blocks
from megatron_sip.data.preprocess.inputs import InputFile
from megatron_sip.data.preprocess.records import Cursor
from megatron_sip.data.preprocess.texts import texts_of


def read_documents(
    files: Sequence[InputFile],
    *,
    text_key: str,
    bad: BadRecords,
    max_record_bytes: int = 1 << 24,
) -> Iterator[str]:
    """Stream documents in the order of `files`; a block of records is in memory at a time.

    Args:   files: from `expand_inputs`. text_key: key of the text in JSON or column of a table,
            dots go deeper. bad: counts records that are left out.
    Raises: ValueError if there are more bad records than `bad` allows, or a file is damaged.
    """
    blocks = read_blocks(
        files, columns=(text_key,), max_record_bytes=max_record_bytes, start=Cursor()
    )
    for block in blocks:
        records = texts_of(block, text_key=text_key, kept=(), max_record_bytes=max_record_bytes)
        for record in records:
            if record.reason:
                bad.add(f"{files[block.cursor.source].url}:{record.record}", record.reason)
            else:
                yield record.text
