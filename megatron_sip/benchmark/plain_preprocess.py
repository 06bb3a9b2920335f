"""What Megatron's own preprocessing does, as the baseline of `preprocess`: a pool of processes that
parse and encode one document at a time, and a parent that feeds Megatron-Core's builder."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np

from megatron_sip.data.tokenizer import Tokenizer

_TOKENIZER: Tokenizer


def _start(path: Path) -> None:
    global _TOKENIZER
    _TOKENIZER = Tokenizer.load(path)


def _encode(line: str) -> list[int]:
    return [*_TOKENIZER.encode(json.loads(line)["text"]), _TOKENIZER.eod]


def plain_script(corpus: Path, tokenizer: Path, output: Path, *, workers: int) -> None:
    """What Megatron's own script does, with the same number of processes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = Tokenizer.load(tokenizer).vocab_size
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(vocab_size))
    with (
        multiprocessing.get_context("spawn").Pool(workers, _start, (tokenizer,)) as pool,
        open(corpus, encoding="utf-8") as lines,
    ):
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(np.array(ids), [len(ids)])  # pyright: ignore[reportArgumentType]
    builder.finalize(f"{output}.idx")
