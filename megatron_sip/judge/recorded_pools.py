"""Which recorded pools are judged again, and reading them a few steps at a time."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.pool_store import PoolRecord, read_pools


@dataclass(frozen=True)
class Ledger:
    """The recorded pools of one run."""

    name: str  # of the run
    folder: Path  # with step_00000000.done, ...


@dataclass(frozen=True)
class Part:
    """Pools of one committed step."""

    ledger: Ledger
    step: int
    positions: np.ndarray  # int64[n], ascending, those that are wanted


def find_ledgers(paths: Sequence[Path]) -> list[Ledger]:
    """The ledgers of run folders, or of their pools/ folders.

    Raises: ValueError if one holds no committed step, or is named twice.
    """
    found: dict[Path, Ledger] = {}
    for path in paths:
        folder = path / "pools" if (path / "pools").is_dir() else path
        if not any(folder.glob("step_*.done")):
            raise ValueError(
                f"--pools {path} holds no committed step (step_00000000.done, ...); give the "
                "folder of a run, or its pools/ folder"
            )
        key = folder.resolve()
        if key in found:
            raise ValueError(f"--pools {path}: these pools are named twice; name them once")
        run = key.parent if key.name == "pools" else key
        taken = {ledger.name for ledger in found.values()}
        found[key] = Ledger(str(run) if run.name in taken else run.name, folder)
    return list(found.values())


def parse_steps(text: str) -> slice:
    """`A:B`, steps from A up to, not including, B; either may be left out.

    Raises: ValueError if it is anything else.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(part == "" or part.isdecimal() for part in parts):
        raise ValueError(f"--steps {text}: write A:B, A: or :B with whole numbers, such as 0:100")
    first, end = (int(part) if part else None for part in parts)
    if end is not None and end <= (first or 0):
        raise ValueError(f"--steps {text} names no step; B must be above A")
    return slice(first, end)


def choose(ledgers: Sequence[Ledger], *, steps: slice, sample: int | None, seed: int) -> list[Part]:
    """The pools to judge, by ledger and step.

    Args:   sample: so many of them, drawn by `seed`; None, or more than there are: all.
    Raises: ValueError if there is none.
    """
    parts = [
        Part(ledger, step, _positions(ledger.folder, step))
        for ledger in ledgers
        for step in _committed(ledger.folder, steps)
    ]
    total = sum(len(part.positions) for part in parts)
    if not total:
        first, end = steps.start or 0, "" if steps.stop is None else steps.stop
        raise ValueError(
            f"--steps {first}:{end}: no such step is recorded; ledger steps count from 0"
        )
    if sample is None or sample >= total:
        return parts
    if sample < 1:
        raise ValueError(f"--sample {sample}: must be at least 1")
    drawn = np.sort(
        np.random.Generator(np.random.Philox(seed)).choice(total, sample, replace=False)
    )
    ends = np.cumsum([len(part.positions) for part in parts])
    chosen = []
    for part, end in zip(parts, ends, strict=True):
        begin = end - len(part.positions)
        mine = drawn[(drawn >= begin) & (drawn < end)] - begin
        if len(mine):
            chosen.append(Part(part.ledger, part.step, part.positions[mine]))
    return chosen


def _committed(folder: Path, steps: slice) -> list[int]:
    names = (path.stem.removeprefix("step_") for path in folder.glob("step_*.done"))
    numbers = sorted(int(name) for name in names if name.isdecimal())
    end = steps.stop if steps.stop is not None else numbers[-1] + 1
    return [n for n in numbers if (steps.start or 0) <= n < end]


def _positions(folder: Path, step: int) -> np.ndarray:
    """Positions of a step's pools; reads that column alone."""
    found: set[int] = set()
    for path in sorted(folder.glob(f"step_{step:08d}.dp*.parquet")):
        try:
            column = pq.read_table(path, columns=["position"])["position"]
        except (OSError, ValueError) as error:  # of pyarrow, which names no file
            raise ValueError(f"{path} cannot be read ({error}); restore it from a copy") from None
        found.update(column.unique().to_pylist())
    return np.array(sorted(found), np.int64)


def read_part(part: Part) -> list[PoolRecord]:
    """Its pools, checked against the step's digests. Raises: ValueError as `read_pools`."""
    records = read_pools(part.ledger.folder, part.step, dp_rank=0, dp_size=1)
    wanted = set(part.positions.tolist())
    return [record for record in records if record.position in wanted]


def batches(parts: Sequence[Part], *, size: int) -> Iterator[list[tuple[Ledger, PoolRecord]]]:
    """Whole steps joined until they hold `size` pools; one batch is in memory at a time."""
    batch: list[tuple[Ledger, PoolRecord]] = []
    for part in parts:
        batch += [(part.ledger, record) for record in read_part(part)]
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def check_tokenizer(
    tokenizer: Tokenizer, path: Path, *, ledger: Ledger, record: PoolRecord
) -> None:
    """Whether a tokenizer reads the ids of a pool as the text that is recorded beside them.

    Args:   path: of the tokenizer, data.tokenizer of the recipe.
    Raises: ValueError naming pool, tokenizer and that of the recorded run.
    """
    sample = record.pool.sample
    try:
        text = tokenizer.continuation_text(sample.prefix_ids, sample.suffix_ids)[0]
    except ValueError:
        text = None
    if text != record.pool.prefix_text:
        raise ValueError(
            f"{ledger.folder}, step {record.step}, pool {record.position}: its token ids are not "
            f"of data.tokenizer {path} (digest {tokenizer.digest[:12]}), with which they spell "
            f"another text than the recorded one; {_recorded_tokenizer(ledger)}. Set "
            "data.tokenizer to it, or ask by prompts that do not show the original suffix"
        )


def _recorded_tokenizer(ledger: Ledger) -> str:
    """Words on the tokenizer of the run that wrote a ledger; what cannot be read is unknown."""
    run_dir, known = ledger.folder.resolve().parent, []
    unreadable = (OSError, ValueError, KeyError, TypeError)
    with suppress(*unreadable):
        settings = tomllib.loads((run_dir / "config.toml").read_text())
        known.append(f"data.tokenizer {settings['data']['tokenizer']}")
    for state in sorted(run_dir.glob("checkpoints/*/train_state.json"))[-1:]:
        with suppress(*unreadable):
            known.append(f"digest {json.loads(state.read_text())['digests']['tokenizer'][:12]}")
    return f"the run had {', '.join(known)}" if known else "nothing beside it names its tokenizer"
