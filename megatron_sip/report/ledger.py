"""Read the recorded pools: mean rewards by source for the curves, a sample for the browser.

Ledger step s made the weights of step s + 1, under which metrics.jsonl logs it; the page numbers
both as metrics.jsonl does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.pool_store import PoolRecord, read_pools

MAX_STEPS, MIN_STEPS = 200, 20  # of the committed steps are read at most, evenly spaced,
MAX_READ = 10_000  # and fewer if that were more pools than this
MAX_PREFIX = 1200  # characters of a prefix that are shown, its end
MAX_TEXT = 2000  # characters of a candidate
MAX_REPLIES = 40  # judge replies of a pool, each at most MAX_REPLY characters
MAX_REPLY = 300


@dataclass
class Ledger:
    """What the page shows of pools/."""

    committed: int = 0  # steps with a commit marker
    steps: list[int] = field(default_factory=list)  # those read, numbered as in metrics.jsonl
    means: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """(source, criterion or "total") -> mean over valid candidates, one a step read."""
    pools: list[dict[str, Any]] = field(default_factory=list)  # plain data for the browser
    pools_read: int = 0


def read_ledger(folder: Path, *, max_pools: int, problems: list[str]) -> Ledger:
    """Read the committed steps, evenly thinned so that reading ends soon.

    Args: max_pools: most pools kept, spread evenly over steps; problems: gets a sentence for what
          is damaged.
    """
    ledger = Ledger()
    names = [path.stem.removeprefix("step_") for path in folder.glob("step_*.done")]
    steps = sorted(int(name) for name in names if name.isdecimal())
    ledger.committed = len(steps)
    damaged: list[str] = []
    chosen = evenly(steps, _number_to_read(folder, steps))
    for i, step in enumerate(chosen):
        try:
            records = read_pools(folder, step, dp_rank=0, dp_size=1)
        except (ValueError, TypeError, KeyError, OSError) as error:
            damaged.append(str(error).replace(f"{folder}/", ""))
            continue
        ledger.steps.append(step + 1)
        ledger.pools_read += len(records)
        _add_means(ledger, records)
        share = (i + 1) * max_pools // len(chosen) - i * max_pools // len(chosen)
        ledger.pools += [_plain(record) for record in _spread(records, share, offset=i)]
    if damaged:
        problems.append(
            f"pools/: {len(damaged)} of {len(chosen)} steps cannot be read and are left out; the "
            f"first: {damaged[0]}."
        )
    return ledger


def _number_to_read(folder: Path, steps: Sequence[int]) -> int:
    """How many steps to read, by the number of pools in the first one that can be read."""
    for step in steps[:MIN_STEPS]:
        try:
            size = len(read_pools(folder, step, dp_rank=0, dp_size=1))
        except (ValueError, TypeError, KeyError, OSError):
            continue  # counted when it is read for the page
        return max(MIN_STEPS, min(MAX_STEPS, MAX_READ // max(1, size)))
    return MAX_STEPS


def evenly(items: Sequence[int], limit: int) -> list[int]:
    """At most `limit` items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    places = np.linspace(0, len(items) - 1, limit).round().astype(int)
    return [items[i] for i in places]


def _spread(records: Sequence[PoolRecord], share: int, *, offset: int) -> list[PoolRecord]:
    """`share` of the records, evenly spaced, other positions at each `offset`."""
    if share >= len(records):
        return list(records)
    places = {(offset + i * len(records) // share) % len(records) for i in range(share)}
    return [records[i] for i in sorted(places)]


def _add_means(ledger: Ledger, records: Sequence[PoolRecord]) -> None:
    """Append one step to each mean; NaN where the step has none."""
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        rewards = {"total": record.rewards.total, **record.rewards.by_criterion}
        for c, candidate in enumerate(record.pool.candidates):
            if record.rewards.valid[c]:
                for name, scores in rewards.items():
                    values.setdefault((candidate.source, name), []).append(float(scores[c]))
    before = len(ledger.steps) - 1
    for key in {*ledger.means, *values}:
        finite = [v for v in values.get(key, ()) if math.isfinite(v)]
        mean = sum(finite) / len(finite) if finite else math.nan
        ledger.means.setdefault(key, [math.nan] * before).append(mean)


def _plain(record: PoolRecord) -> dict[str, Any]:
    """One pool as JSON can hold it."""
    pool, sample = record.pool, record.pool.sample
    trained = [pick for pick in record.picks if pick.candidate >= 0]
    prefix = pool.prefix_text
    return {
        "step": record.step + 1, "position": record.position,
        "file": f"step_{record.step:08d}", "sample": sample.sample_id,
        "document": sample.document_id, "cut": sample.cut,
        "prefix": prefix[-MAX_PREFIX:], "hidden": max(0, len(prefix) - MAX_PREFIX),
        "chance": pool.chance_rollout, "missing": record.rewards.num_missing,
        "skipped": bool(trained) and all(pick.weight == 0 for pick in trained),
        "candidates": [_plain_candidate(record, c) for c in range(len(pool.candidates))],
        "replies": _replies(record),
    }  # fmt: skip


def _plain_candidate(record: PoolRecord, c: int) -> dict[str, Any]:
    candidate, rewards = record.pool.candidates[c], record.rewards
    text = candidate.text
    return {
        "source": candidate.source, "version": candidate.policy_version,
        "finish": candidate.finish_reason, "tokens": len(candidate.token_ids),
        "text": text[:MAX_TEXT], "hidden": max(0, len(text) - MAX_TEXT),
        "reward": _finite(rewards.total[c]) if rewards.valid[c] else None,
        "criteria": {name: _finite(v[c]) for name, v in rewards.by_criterion.items()},
        "roles": sorted({pick.role for pick in record.picks if pick.candidate == c}),
    }  # fmt: skip


def _replies(record: PoolRecord) -> list[dict[str, Any]]:
    """Verdicts in words; a reply that only repeats its score is left out."""
    found = []
    for verdict in record.verdicts:
        if len(found) < MAX_REPLIES and not _is_number(verdict.reply):
            found.append(
                {
                    "criterion": verdict.criterion, "candidate": verdict.candidate,
                    "opponent": verdict.opponent,
                    "score": None if verdict.score is None else _finite(verdict.score),
                    "reply": verdict.reply[:MAX_REPLY],
                }
            )  # fmt: skip
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True


def _finite(value: Any) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
