"""Text files to indexed datasets: read, split, tokenize, write, publish all or nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sip.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_sip.data.manifest import Manifest, Source
from megatron_sip.data.readers import BadRecords, expand_inputs, read_documents
from megatron_sip.data.splits import Split, split_of
from megatron_sip.data.tokenizer import Tokenizer

_REFRESH_S = 0.2
_LOGGER = logging.getLogger(__name__)


class _Line:
    """The progress line: documents, MB/s, tokens/s, time left."""

    def __init__(self, progress: Progress, *, total_bytes: int) -> None:
        self._progress = progress
        self._task = progress.add_task("preprocess", total=total_bytes, rates="")
        self._start_s = self._shown_s = time.monotonic()
        self._documents = self._tokens = self._bytes = 0

    def advance(self, *, tokens: int, num_bytes: int) -> None:
        self._documents += 1
        self._tokens += tokens
        self._bytes += num_bytes
        if time.monotonic() - self._shown_s >= _REFRESH_S:
            self.show()

    def show(self) -> None:
        self._shown_s = time.monotonic()
        seconds = max(self._shown_s - self._start_s, 1e-9)
        rates = (
            f"{self._documents:,} documents, {self._bytes / 1e6 / seconds:.2f} MB/s, "
            f"{self._tokens / seconds:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=self._bytes, rates=rates)


@contextmanager
def _progress_line(*, total_bytes: int) -> Iterator[_Line]:
    columns = (BarColumn(20), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        line = _Line(progress, total_bytes=total_bytes)
        yield line
        line.show()


def preprocess(
    inputs: Sequence[str],
    *,
    tokenizer: Path,
    output_prefix: Path,
    text_key: str = "text",
    split: Split | None = None,
    append_eod: bool = True,
    max_bad_records: int = 0,
) -> dict[str, Manifest]:
    """Make one indexed dataset, or one for each split.

    Args:    inputs: globs of .jsonl and .txt files. tokenizer: sentencepiece file.
             output_prefix: PREFIX; writes PREFIX.* without, PREFIX_NAME.* with a split.
             text_key: key of the text in JSON, dots go deeper.
             append_eod: end each document with the end-of-document id.
             max_bad_records: unusable records that may be left out (and are counted).
    Returns: manifest by split name; the name is "" without a split.
    Raises:  ValueError for unusable inputs, too many bad records, or a split without documents;
             then nothing is published and older files stay as they are.
    """
    policy_tokenizer = Tokenizer.load(tokenizer)
    paths = expand_inputs(inputs)
    sources = tuple(Source(path=str(p), bytes=p.stat().st_size) for p in paths)
    bad = BadRecords(limit=max_bad_records)
    writers: dict[str, IndexedDatasetWriter] = {}
    try:
        for name in split.names if split else ("",):
            prefix = output_prefix.with_name(output_prefix.name + (f"_{name}" if name else ""))
            writers[name] = IndexedDatasetWriter(prefix, vocab_size=policy_tokenizer.vocab_size)
        with _progress_line(total_bytes=sum(s.bytes for s in sources)) as line:
            for text, num_bytes in read_documents(paths, text_key=text_key, bad=bad):
                ids = policy_tokenizer.encode(text)
                if append_eod:
                    ids.append(policy_tokenizer.eod)
                writers[split_of(text, split) if split else ""].add(ids)
                line.advance(tokens=len(ids), num_bytes=num_bytes)
        manifests = {
            name: writer.stage(
                split=name,
                split_shares=str(split) if split else "",
                split_salt=split.salt if split else "",
                tokenizer_digest=policy_tokenizer.digest,
                eod=policy_tokenizer.eod,
                append_eod=append_eod,
                bad_records=bad.count,
                sources=sources,
            )
            for name, writer in writers.items()
        }
        for writer in writers.values():
            writer.publish()
        if bad.count:
            _LOGGER.warning("left out %d bad records:\n  %s", bad.count, "\n  ".join(bad.places))
    finally:
        for writer in writers.values():
            writer.discard()
    return manifests
