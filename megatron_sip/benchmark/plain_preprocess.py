"""What Megatron's own preprocessing does, as the baseline of `preprocess`: a pool of processes that
parse and encode one document at a time, and a parent that feeds Megatron-Core's builder.

python -m megatron_sip.benchmark.plain_preprocess CORPUS.jsonl TOKENIZER OUTPUT WORKERS
prints the seconds that its work took, imports left out.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_sip.data.tokenizer import Tokenizer

_TOKENIZER: Tokenizer


def _start(path: Path) -> None:
    global _TOKENIZER
    _TOKENIZER = Tokenizer.load(path)


def _encode(line: str) -> list[int]:
    return [*_TOKENIZER.encode(json.loads(line)["text"]), _TOKENIZER.eod]


def plain_script(corpus: Path, tokenizer: Path, output: Path, *, workers: int) -> None:
    """What Megatron's own script does, with the same number of processes."""
    vocab_size = Tokenizer.load(tokenizer).vocab_size
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(vocab_size))
    with (
        multiprocessing.get_context("fork").Pool(workers, _start, (tokenizer,)) as pool,
        open(corpus, encoding="utf-8") as lines,
    ):
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(np.array(ids), [len(ids)])  # pyright: ignore[reportArgumentType]
    builder.finalize(f"{output}.idx")


if __name__ == "__main__":
    _started = time.perf_counter()
    plain_script(*map(Path, sys.argv[1:4]), workers=int(sys.argv[4]))
    print(time.perf_counter() - _started)
