"""One block of records to token ids: what a worker process does."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from megatron_sip.data.panics import panics_told
from megatron_sip.data.preprocess.encoders import (
    CHECK_EVERY,
    Checked,
    Encoder,
    ExactEncoder,
    WrongBackendError,
    encode_checked,
    fast_encoder,
)
from megatron_sip.data.preprocess.records import Block, Cursor
from megatron_sip.data.preprocess.texts import Text, texts_of
from megatron_sip.data.provenance import batch_of
from megatron_sip.data.splits import Split, split_of
from megatron_sip.data.token_dtype import dtype_of
from megatron_sip.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Work:
    """What all workers of a run share. Args: tokenizer: its file. vocab_size, eod: of it. exact:
    without a fast backend. split: None for one dataset. The rest: as in `preprocess`."""

    tokenizer: Path
    vocab_size: int
    eod: int
    exact: bool
    text_key: str
    kept: tuple[str, ...]
    split: Split | None
    append_eod: bool
    max_record_bytes: int


@dataclass(frozen=True)
class EncodedBlock:
    """A block's documents.

    Args: end: where the next block begins. parts: by split, (dtype[T] token ids one document after
          another, provenance). bad: (record, reason). documents, tokens,
          input_bytes: counts. checked: what the fast backend made of the texts whose turn it is.
    """

    source: int
    end: Cursor
    parts: dict[str, tuple[bytes, pa.RecordBatch]]
    bad: tuple[tuple[int, str], ...]
    documents: int
    tokens: int
    input_bytes: int
    checked: Checked


class BlockEncoder:
    """Encodes blocks with one tokenizer."""

    def __init__(self, work: Work) -> None:
        self.work = work
        fast, self.why_exact = None, ""
        if not work.exact:
            fast, self.why_exact = _FAST.get(work.tokenizer) or fast_encoder(work.tokenizer)
        self.is_fast = fast is not None
        self._encoder: Encoder = fast or ExactEncoder(Tokenizer.load(work.tokenizer))

    def encode(self, block: Block) -> EncodedBlock:
        """The documents of a block. Raises: WrongBackendError if the fast backend fails."""
        work = self.work
        records = list(
            texts_of(
                block,
                text_key=work.text_key,
                kept=work.kept,
                max_record_bytes=work.max_record_bytes,
            )
        )
        good = [r for r in records if not r.reason]
        with self._named_failures():
            ids, counts = self._encoder.encode([r.text for r in good])
        bad = [(r.record, r.reason) for r in records if r.reason]
        bad += [(r.record, "gives no token") for r, n in zip(good, counts, strict=True) if not n]
        good, counts = [r for r, n in zip(good, counts, strict=True) if n], counts[counts > 0]
        digests = [xxhash.xxh3_64_intdigest(r.text.encode()) for r in good]
        chosen = [r.text for r, n in zip(good, digests, strict=True) if n % CHECK_EVERY == 0]
        tokens, counts = self._tokens(ids, counts)
        ends = np.cumsum(counts) * tokens.itemsize
        data = tokens.tobytes()
        view, starts = memoryview(data), [0, *ends.tolist()]
        documents = [view[i:j] for i, j in itertools.pairwise(starts)]
        columns = [
            [block.cursor.source] * len(good),
            [r.record for r in good],
            counts,
            digests,
            [xxhash.xxh3_64_intdigest(document) for document in documents],
            *([r.kept[k] for r in good] for k in range(len(work.kept))),
        ]
        rows = batch_of(columns, work.kept)
        return EncodedBlock(
            source=block.cursor.source,
            end=block.end,
            parts=self._parts(good, data, documents, rows),
            bad=tuple(sorted(bad)),
            documents=len(good),
            tokens=tokens.size,
            input_bytes=block.input_bytes,
            checked=self.check(chosen),
        )

    def check(self, texts: Sequence[str]) -> Checked:
        """What the fast backend makes of these; none if there is no fast one."""
        with self._named_failures():
            return encode_checked(self._encoder, texts if self.is_fast else ())

    @contextlib.contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Raises: WrongBackendError for what a fast backend raises."""
        try:
            with panics_told("it panicked"):
                yield
        except Exception as error:
            if not self.is_fast:
                raise
            raise WrongBackendError(f"{self._encoder.name} failed: {error}") from None

    def _tokens(self, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dtype[T] of all documents, tokens of each), end-of-document ids included."""
        size = self.work.vocab_size
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(
                f"{self._encoder.name} gave ids {ids.min()}..{ids.max()}, outside [0, {size}); "
                "the tokenizer's file contradicts itself"
            )
        if self.work.append_eod:
            ids, counts = np.insert(ids, np.cumsum(counts), self.work.eod), counts + 1
        return ids.astype(dtype_of(size)), counts

    def _parts(
        self,
        good: Sequence[Text],
        tokens: bytes,
        documents: Sequence[memoryview],
        rows: pa.RecordBatch,
    ) -> dict[str, tuple[bytes, pa.RecordBatch]]:
        """Token ids and provenance by split."""
        split = self.work.split
        if split is None:
            return {"": (tokens, rows)} if good else {}
        names = np.array([split_of(r.text, split) for r in good])
        parts = {}
        for name in dict.fromkeys(names.tolist()):
            chosen = np.flatnonzero(names == name)
            found = b"".join(documents[i] for i in chosen.tolist())
            parts[name] = found, rows.take(pa.array(chosen.tolist(), pa.int64()))
        return parts


# Loaded before this process was forked.
_FAST: dict[Path, tuple[Encoder | None, str]] = {}

_WORK: Work
_ENCODER: BlockEncoder | None = None


def preload(tokenizer: Path) -> None:
    """Load the fast backend of a tokenizer for the workers that this process forks."""
    _FAST[tokenizer] = fast_encoder(tokenizer)


def start(work: Work) -> None:
    """Make this process a worker; it ends when its parent does."""
    global _WORK
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORK = work


def _encoder() -> BlockEncoder:
    """This worker's, loaded when it is first asked for, so that its errors reach who asked."""
    global _ENCODER
    _ENCODER = _ENCODER or BlockEncoder(_WORK)
    return _ENCODER


def why_exact() -> str:
    """Why no fast backend is used though one was asked for, "" if one is."""
    return _encoder().why_exact


def check(texts: Sequence[str]) -> Checked:
    """What the fast backend makes of the first texts."""
    return _encoder().check(texts)


def encode(block: Block) -> EncodedBlock:
    """Encode a block in a worker."""
    return _encoder().encode(block)
