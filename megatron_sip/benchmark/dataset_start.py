"""Benchmark `dataset-start`: from files to the first batch.

10^12 tokens: 10,000 datasets of 100,000 documents, one real `.idx` under 10,000 names and a sparse
`.bin`; measured in a process of its own, after its imports. 10^9 tokens: our first batch against
Megatron-Core's GPTDataset, which builds its document, sample and shuffle indexes first. The page
cache is warm for both: the files have just been written.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megatron_sip.benchmark.measure import one_rank
from megatron_sip.data.blended_corpus import open_corpus
from megatron_sip.data.provenance import batch_of
from megatron_sip.data.sampler import PrefixSuffixSampler
from megatron_sip.data.staged_dataset import Position, StagedDataset

FILES, DOCUMENTS, LENGTH = 10_000, 100_000, 1_000  # datasets, documents of each, tokens of each
FEW_FILES = 10  # datasets of 10^9 tokens together
BATCH, VOCAB, MIN_TOKENS, SEED = 256, 32_000, 256, 1
REPETITIONS, STARTS = 5, 20


def run() -> dict[str, Any]:
    """Measure. Raises: ValueError if something was written, or memory cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        many, few = root / "many", root / "few"
        sparse_dataset(many / "d", documents=DOCUMENTS)
        sparse_dataset(few / "d", documents=DOCUMENTS)
        spread(many / "d", FILES)
        spread(few / "d", FEW_FILES)
        before = listing(root)
        large = [_first_batch(many) for _ in range(REPETITIONS)]
        if listing(root) != before:
            raise ValueError(f"{root}: the start wrote a file")
        results = {key: median(found[key] for found in large) for key in large[0]}
        with one_rank():
            results |= _small(few, root)
    ratios = {
        "speedup": results["megatron_1e9_s"] / results["ours_1e9_s"],
        "first_batch_s": results["first_batch_s"],
    }
    settings = {
        "datasets": FILES, "documents": FILES * DOCUMENTS, "tokens": FILES * DOCUMENTS * LENGTH,
        "batch": BATCH, "repetitions": REPETITIONS, "page_cache": "warm",
    }  # fmt: skip
    return {"name": "dataset-start", "settings": settings, "results": results, "ratios": ratios}


def _small(folder: Path, root: Path) -> dict[str, float]:
    """Seconds until the first sample can be read, turn and turn about; medians."""
    seconds: dict[str, list[float]] = {"ours_1e9_s": [], "megatron_1e9_s": []}
    for repetition in range(REPETITIONS + 1):
        cache = root / f"cache{repetition}"
        ours = _timed(partial(_starts, folder)) / STARTS
        plain = _timed(partial(megatron_start, folder, cache))
        if repetition:  # the first warms up
            seconds["ours_1e9_s"].append(ours)
            seconds["megatron_1e9_s"].append(plain)
    return {name: median(found) for name, found in seconds.items()}


def _starts(folder: Path) -> None:
    """STARTS of ours: one is too short to be timed alone."""
    for _ in range(STARTS):
        first_batch(folder, 1)


def sparse_dataset(prefix: Path, *, documents: int) -> None:
    """A published dataset whose `.idx` is real and whose `.bin` is a hole."""
    size = 2 * documents * LENGTH  # uint16
    staged = StagedDataset(prefix.parent / "partial", prefix=prefix, vocab_size=VOCAB)
    rows = np.full(documents, LENGTH)
    nothing = np.zeros(documents, np.int64)
    staged.append(b"", batch_of([nothing, nothing, rows, nothing, nothing]))
    position = staged.position()
    staged.close()
    os.truncate(prefix.parent / "partial" / "dataset.bin", size)
    position = Position(size, position.stream_bytes, documents, documents * LENGTH)
    staged = StagedDataset(
        prefix.parent / "partial", prefix=prefix, vocab_size=VOCAB, position=position
    )
    staged.stage(
        min_tokens=MIN_TOKENS, append_eod=False, made_by="preprocess", split="", split_shares="",
        split_salt="", tokenizer_digest="0" * 64, eod=1, bad_records=0, sources=(),
    )  # fmt: skip
    staged.publish()
    staged.close()


def spread(prefix: Path, files: int) -> None:
    """The same dataset under many names, by hard links."""
    for suffix in (".bin", ".idx", ".eligible", ".manifest.json"):
        for file in range(files):
            target = prefix.with_name(f"shard_{file:05d}{suffix}")
            target.hardlink_to(prefix.with_name(prefix.name + suffix))


def listing(root: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of every file."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def first_batch(folder: Path, batch: int) -> None:
    """Open all datasets of a folder and read the first samples."""
    corpus = open_corpus(folder / "shard_*", min_tokens=MIN_TOKENS, cache_dir=None)
    sampler = PrefixSuffixSampler(
        corpus, prefix_tokens=1920, min_prefix_tokens=128, suffix_tokens=128, seed=SEED,
        word_starts=np.zeros(VOCAB, bool), eod=1,
    )  # fmt: skip
    for i in range(batch):
        sampler[i]


def megatron_start(folder: Path, cache: Path) -> None:
    """Megatron-Core's blend of all datasets of a folder for one pass, and its first sample."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefixes = [str(path.with_suffix("")) for path in sorted(folder.glob("shard_*.idx"))]
    tokenizer: Any = _Tokenizer()
    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=2048, blend=(prefixes, None), split="1,0,0",
        path_to_cache=str(cache), tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    sizes: Any = [None, 0, 0]  # one pass
    built: Any = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    built[0][0]


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size = 1, 0, VOCAB
    unique_identifiers: dict[str, str] = {"class": "none"}  # noqa: RUF012


def _timed(task: Callable[[], Any]) -> float:
    gc.collect()  # so that no time holds the end of what came before
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def _first_batch(folder: Path) -> dict[str, float]:
    """Seconds and memory of the first batch in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sip.benchmark.dataset_start", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"the first batch of {folder} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _main(folder: Path) -> None:
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    seconds = _timed(lambda: first_batch(folder, BATCH))
    memory = process.memory_info().rss - before
    print(json.dumps({"first_batch_s": seconds, "more_memory_mb": memory / 1e6}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
