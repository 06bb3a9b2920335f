"""Input files to indexed datasets: one reader, several tokenizing processes, one writer in order.

The bytes that are written depend on the input and the settings alone, not on the number of
workers, the backend, or where a run was killed and went on.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.data.manifest import Manifest, Source
from megatron_sip.data.preprocess import journal, processes, worker
from megatron_sip.data.preprocess.blocks import read_blocks
from megatron_sip.data.preprocess.encoders import (
    MAX_CHECKED_CHARS,
    Checked,
    WrongBackendError,
    difference,
)
from megatron_sip.data.preprocess.inputs import InputFile, expand_inputs
from megatron_sip.data.preprocess.progress_line import ProgressLine, progress_line
from megatron_sip.data.preprocess.records import Block, Cursor
from megatron_sip.data.preprocess.texts import texts_of
from megatron_sip.data.preprocess.worker import EncodedBlock, Work
from megatron_sip.data.preprocess.worker_pool import WorkerDiedError, WorkerPool
from megatron_sip.data.provenance import schema_of
from megatron_sip.data.splits import Split
from megatron_sip.data.staged_dataset import StagedDataset
from megatron_sip.data.tokenizer import Tokenizer

_JOURNAL_S = 5.0
# Of the proof before the run: files, and blocks and characters of each.
_SAMPLED_FILES, _SAMPLED_BLOCKS, _SAMPLE_CHARS = 8, 16, 1 << 17
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is to be made.

    Args: tokenizer: file. output_prefix: PREFIX; PREFIX.* without, PREFIX_NAME.* with a split.
          text_key: key of the text in JSON, column of a table; dots go deeper. kept: keys whose
          values become columns of PREFIX.documents.parquet. append_eod: end each document with
          the end-of-document id. min_tokens: shorter documents are not in PREFIX.eligible.
          max_bad_records: unusable records that may be left out (and are counted).
          max_record_bytes: longer records cannot be used. workers: tokenizing processes.
          resume: go on with a killed run. exact: use no fast backend. follow_links: read links
          that lead out of the folder or pattern they lie in.
    """

    tokenizer: Path
    output_prefix: Path
    text_key: str = "text"
    kept: tuple[str, ...] = ()
    split: Split | None = None
    append_eod: bool = True
    min_tokens: int = 256
    max_bad_records: int = 0
    max_record_bytes: int = 1 << 24
    workers: int = 1
    resume: bool = False
    exact: bool = False
    follow_links: bool = False


def preprocess(inputs: Sequence[str], settings: Settings) -> dict[str, Manifest]:
    """Make one indexed dataset, or one for each split.

    Args:    inputs: paths, folders, globs and fsspec URLs.
    Returns: manifest by split name; the name is "" without a split.
    Raises:  ValueError for unusable inputs, too many bad records, or a split without documents;
             then nothing is published and older files stay as they are. What was done so far
             waits in PREFIX.partial for `resume`.
    """
    _check_kept(settings.kept)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    files = expand_inputs(inputs, follow_links=settings.follow_links)
    tokenizer = Tokenizer.load(settings.tokenizer)
    identity = _identity(files, settings, tokenizer)
    with journal.working_folder(settings.output_prefix, resume=settings.resume) as folder:
        progress = journal.load(folder, identity=identity) or journal.Progress()
        progress.exact = progress.exact or settings.exact
        try:
            with _pool(settings, tokenizer, exact=progress.exact) as pool:
                return _Run(files, settings, tokenizer, folder, identity, progress, pool).make()
        except WrongBackendError as error:
            _LOGGER.warning("%s; beginning anew with the exact tokenizer", error)
        journal.remove(folder)
        progress = journal.Progress(exact=True)
        with _pool(settings, tokenizer, exact=True) as pool:
            return _Run(files, settings, tokenizer, folder, identity, progress, pool).make()


@contextmanager
def _pool(settings: Settings, tokenizer: Tokenizer, *, exact: bool) -> Iterator[WorkerPool]:
    """Tokenizing processes. Raises: ValueError if one dies."""
    work = Work(
        tokenizer=settings.tokenizer,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        exact=exact,
        text_key=settings.text_key,
        kept=settings.kept,
        split=settings.split,
        append_eod=settings.append_eod,
        max_record_bytes=settings.max_record_bytes,
    )
    pool = WorkerPool(settings.workers, processes.context(), worker.start, work)
    try:
        yield pool
    except WorkerDiedError:
        raise ValueError(
            "a tokenizing process died (killed, perhaps for want of memory); nothing was "
            "published; run again with --resume, and fewer --workers if memory was short"
        ) from None
    finally:
        pool.close()


class _Run:
    """One pass over the input with one backend."""

    def __init__(
        self,
        files: Sequence[InputFile],
        settings: Settings,
        tokenizer: Tokenizer,
        folder: Path,
        identity: dict[str, Any],
        progress: journal.Progress,
        pool: WorkerPool,
    ) -> None:
        self._files, self._settings, self._tokenizer = files, settings, tokenizer
        self._folder, self._identity, self._progress = folder, identity, progress
        self._pool = pool
        self._bad = progress.bad_records(settings.max_bad_records)
        if self._bad.count > self._bad.limit:
            raise ValueError(
                f"--resume: {self._bad.count} records were left out already, --max-bad-records is "
                f"{self._bad.limit}; give at least {self._bad.count}, or remove {folder}"
            )

    def make(self) -> dict[str, Manifest]:
        """Read, tokenize, write, publish."""
        settings, progress = self._settings, self._progress
        with ExitStack() as stack:
            staged = {
                name: stack.enter_context(closing(self._staged(name)))
                for name in (settings.split.names if settings.split else ("",))
            }
            total = sum(file.bytes for file in self._files)
            line = stack.enter_context(
                progress_line(total_bytes=total, done_bytes=progress.input_bytes)
            )
            self._write(staged, line)
            manifests = {name: self._stage(name, dataset) for name, dataset in staged.items()}
            journal.remove(self._folder)  # from here on its positions are of files that move
            for dataset in staged.values():
                dataset.withdraw_older()
            for dataset in staged.values():
                dataset.publish()
        if self._bad.count:
            places = "\n  ".join(self._bad.places)
            _LOGGER.warning("left out %d bad records:\n  %s", self._bad.count, places)
        return manifests

    def _write(self, staged: dict[str, StagedDataset], line: ProgressLine) -> None:
        """Every block in order; now and then the journal."""
        saved_s = time.monotonic()
        for encoded in self._encoded():
            _compare(encoded.checked, self._tokenizer)
            for name, (tokens, documents) in encoded.parts.items():
                staged[name].append(tokens, documents)
            self._progress.cursor = encoded.end
            self._progress.input_bytes += encoded.input_bytes
            for record, reason in encoded.bad:
                self._bad.add(f"{self._files[encoded.source].url}:{record}", reason)
            self._progress.bad_count = self._bad.count
            self._progress.bad_places = self._bad.places
            line.advance(
                documents=encoded.documents,
                tokens=encoded.tokens,
                input_bytes=encoded.input_bytes,
            )
            if time.monotonic() - saved_s >= _JOURNAL_S:
                self._save(staged)
                saved_s = time.monotonic()
        for dataset in staged.values():
            dataset.check_not_empty()
        self._save(staged)

    def _encoded(self) -> Iterator[EncodedBlock]:
        """Encoded blocks in the order of the input; few are held at a time."""
        waiting: deque[Future[EncodedBlock]] = deque()
        proof = _Proof(self._pool, self._tokenizer)
        if not self._progress.exact:
            proof.begin(self._files, self._settings)
        for block in self._blocks():
            waiting.append(self._pool.submit(worker.encode, block))
            if len(waiting) > 3 * self._settings.workers:
                proof.wait()
                yield waiting.popleft().result()
        proof.wait()
        while waiting:
            yield waiting.popleft().result()

    def _blocks(self) -> Iterator[Block]:
        return read_blocks(
            self._files,
            columns=(self._settings.text_key, *self._settings.kept),
            max_record_bytes=self._settings.max_record_bytes,
            start=self._progress.cursor,
        )

    def _staged(self, name: str) -> StagedDataset:
        prefix = self._settings.output_prefix
        return StagedDataset(
            self._folder / (name or "all"),
            prefix=prefix.with_name(prefix.name + (f"_{name}" if name else "")),
            vocab_size=self._tokenizer.vocab_size,
            kept=self._settings.kept,
            position=self._progress.positions.get(name),
        )

    def _save(self, staged: dict[str, StagedDataset]) -> None:
        self._progress.positions = {name: dataset.position() for name, dataset in staged.items()}
        journal.save(self._folder, self._progress, identity=self._identity)

    def _stage(self, name: str, dataset: StagedDataset) -> Manifest:
        split = self._settings.split
        return dataset.stage(
            min_tokens=self._settings.min_tokens,
            append_eod=self._settings.append_eod,
            made_by="preprocess",
            split=name,
            split_shares=str(split) if split else "",
            split_salt=split.salt if split else "",
            tokenizer_digest=self._tokenizer.digest,
            eod=self._tokenizer.eod,
            bad_records=self._bad.count,
            sources=tuple(Source(path=f.url, bytes=f.bytes) for f in self._files),
        )


def _check_kept(kept: Sequence[str]) -> None:
    """Raises: ValueError if two columns of PREFIX.documents.parquet would have one name."""
    names = [*schema_of().names, *kept]
    twice = [name for name in kept if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"--keep {twice[0]}: PREFIX.documents.parquet has a column of this name already "
            f"({', '.join(dict.fromkeys(names))}); leave it out or rename the key in the input"
        )


def _identity(
    files: Sequence[InputFile], settings: Settings, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What must not change between a run that was killed and the one that goes on with it."""
    return {
        "--input": [[file.url, file.bytes] for file in files],
        "--tokenizer": tokenizer.digest,
        "--text-key": settings.text_key,
        "--keep": list(settings.kept),
        "--split": [str(settings.split), settings.split.salt] if settings.split else None,
        "--no-append-eod": not settings.append_eod,
        "--min-tokens": settings.min_tokens,
        "--max-record-mb": settings.max_record_bytes,
    }


class _Proof:
    """That the fast backend gives the exact ids for the first texts of some of the files."""

    def __init__(self, pool: WorkerPool, tokenizer: Tokenizer) -> None:
        self._pool, self._tokenizer = pool, tokenizer
        self._reasons: list[Future[str]] = []
        self._checked: list[Future[Checked]] = []

    def begin(self, files: Sequence[InputFile], settings: Settings) -> None:
        """Hand the first texts to the workers, before any block."""
        self._reasons.append(self._pool.submit(worker.why_exact))
        for source in range(0, len(files), max(1, -(-len(files) // _SAMPLED_FILES))):
            texts = _first_texts(files, source, settings)
            self._checked.append(self._pool.submit(worker.check, texts))

    def wait(self) -> None:
        """Wait for what has begun. Raises: WrongBackendError with the text on which it is wrong."""
        while self._reasons:
            if reason := self._reasons.pop().result():
                _LOGGER.warning("%s: using the exact tokenizer", reason)
        while self._checked:
            _compare(self._checked.pop().result(), self._tokenizer)


def _compare(checked: Checked, tokenizer: Tokenizer) -> None:
    """Raises: WrongBackendError if the fast backend gave other ids than the exact tokenizer."""
    if wrong := difference(checked, tokenizer):
        raise WrongBackendError(f"the fast tokenizer is wrong on {wrong}")


def _first_texts(files: Sequence[InputFile], source: int, settings: Settings) -> list[str]:
    """About _SAMPLE_CHARS of a file's first texts."""
    texts, chars = [], 0
    blocks = read_blocks(
        files[: source + 1],
        columns=(settings.text_key, *settings.kept),
        max_record_bytes=settings.max_record_bytes,
        start=Cursor(source),
    )
    limit = settings.max_record_bytes
    for block in itertools.islice(blocks, _SAMPLED_BLOCKS):
        for record in texts_of(block, text_key=settings.text_key, kept=(), max_record_bytes=limit):
            if record.text:
                texts.append(record.text[:MAX_CHECKED_CHARS])
                chars += len(texts[-1])
            if chars >= _SAMPLE_CHARS:
                return texts
    return texts
