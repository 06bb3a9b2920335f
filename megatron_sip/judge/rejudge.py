"""Recorded pools, judged again by the [judge] of another recipe, and how far the two agree.

Nothing is trained and nothing in the ledger changes. What a recipe asks is asked as in training,
with its schedule, seed and cache: a call that is repeated pays for nothing, and one that was
interrupted goes on where it stopped. The three files of the result appear at the end, whole, or not
at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sip.config import Config
from megatron_sip.config_judge import AllPairs, SpendLimit
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import RunFailed
from megatron_sip.judge.agreement import PoolAgreement, agreement, live_pairs, standing
from megatron_sip.judge.calibration import (
    Accuracy,
    accuracies,
    check_suffixes,
    pools_of,
    prefix_text_of,
    read_pairs,
)
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.judge_servers import (
    JudgeServers,
    check_prompts,
    judge_server_names,
    novelty_of,
    open_servers,
    policy_tokenizer,
    shows_suffix,
)
from megatron_sip.judge.novelty import Novelty
from megatron_sip.judge.recorded_pools import (
    Ledger,
    Part,
    batches,
    check_tokenizer,
    choose,
    find_ledgers,
    read_part,
)
from megatron_sip.pool_store import PoolRecord
from megatron_sip.publish import atomic_file
from megatron_sip.types import PoolRewards, Source, Verdict

BATCH_POOLS = 16  # asked about at once, at least; whole steps
SCHEMA_VERSION = 1
_F32, _I32, _I64, _TEXT = pa.float32(), pa.int32(), pa.int64(), pa.string()
_COLUMNS = {
    "run": _TEXT, "step": _I64, "position": _I64, "sample_id": _I64, "document_id": _I64,
    "candidate": _I32, "source": _TEXT, "reward_ledger": _F32, "reward_new": _F32,
    "passes_ledger": pa.bool_(), "passes_new": pa.bool_(),
    "by_criterion": pa.list_(pa.struct({"name": _TEXT, "score": _F32})),
    "verdicts": _I32, "missing": _I32,
}  # fmt: skip
SCHEMA = pa.schema(_COLUMNS, metadata={"megatron_sip.rejudged": str(SCHEMA_VERSION)})

Watch = Callable[[int, int, int], None]  # pools done, pools in all, verdicts so far


@dataclass(frozen=True)
class Task:
    """What to judge. Paths are of run folders or pools/ folders."""

    pools: Sequence[Path] = ()
    steps: slice = field(default_factory=lambda: slice(0, None))
    sample: int | None = None  # pools, drawn by run.seed; None: all
    calibration: Path | None = None  # labelled pairs


@dataclass
class Results:
    """What was found, in numbers that fit in memory: no text."""

    pools: list[PoolAgreement] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # of each pool
    documents: list[int] = field(default_factory=list)  # of each pool
    points: list[tuple[Source, float, float]] = field(default_factory=list)
    """(source, reward in the ledger, new reward) of each candidate that both call valid."""
    costs: dict[str, float] = field(default_factory=dict)  # as `Judge.judge_pools` counts
    accuracies: tuple[Accuracy, ...] = ()
    calibration_costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A task whose files were found to be right."""

    parts: tuple[Part, ...]
    tokenizer: Tokenizer | None
    novelty: Novelty | None


def prepare(config: Config, task: Task) -> Prepared:
    """Look at everything that can be wrong before a server is started.

    Raises: ValueError naming what is.
    """
    judge_server_names(config)
    check_prompts(config)
    if task.calibration is not None:
        pairs = read_pairs(task.calibration)
        if shows_suffix(config):
            check_suffixes(pairs, task.calibration)
    parts = []
    if task.pools:
        ledgers = find_ledgers(task.pools)
        parts = choose(ledgers, steps=task.steps, sample=task.sample, seed=config.run.seed)
    tokenizer = policy_tokenizer(config)
    if tokenizer is not None:
        for part in {part.ledger.folder: part for part in parts}.values():
            path = config.data.tokenizer
            check_tokenizer(tokenizer, path, ledger=part.ledger, record=read_part(part)[0])
    return Prepared(tuple(parts), tokenizer, novelty_of(config, tokenizer))


def rejudge(
    config: Config,
    task: Task,
    *,
    output: Path,
    log_dir: Path,
    say: Callable[[str], None],
    watch: Watch,
    publish: Callable[[Results, Path], None],
) -> Results:
    """Judge the pools of a task, and its labelled pairs.

    Args:   output: the .parquet file, not written without pools. publish: writes what else is to
            appear with it, given the results and the .parquet's path.
    Raises: ValueError as `prepare`; RunFailed if a judge fails or judge.limit is reached. No file
            is written then.
    """
    prepared, results = prepare(config, task), Results()
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_file(output)) if prepared.parts else None
        opened = stack.enter_context(open_servers(config, log_dir=log_dir, say=say))
        if task.calibration is not None:
            _calibrate(config, task.calibration, prepared, opened, results)
        if temporary is not None:
            judge = _judge(config, prepared, opened)
            with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
                for rows in _judged(config, judge, prepared, results, watch):
                    writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        publish(results, output)
    return results


def _judge(config: Config, prepared: Prepared, opened: JudgeServers) -> Judge:
    """The recipe's judge of recorded samples; texts as `services.connect` makes them."""
    assert config.judge is not None
    tokenizer = prepared.tokenizer

    def needed() -> Tokenizer:
        assert tokenizer is not None, "policy_tokenizer found no use for it"
        return tokenizer

    return Judge(
        config.judge.criteria,
        servers=opened.servers,
        cache=opened.cache,
        settings=config.judge,
        prefix_text=lambda sample, n: needed().decode(sample.prefix_ids[-n:]),
        suffix_text=lambda s: needed().continuation_text(s.prefix_ids, s.suffix_ids)[1],
        novelty=prepared.novelty,
    )


def _judged(
    config: Config, judge: Judge, prepared: Prepared, results: Results, watch: Watch
) -> Iterator[list[dict[str, Any]]]:
    """Rows of each batch once it is judged; `results` grows with them."""
    total = sum(len(part.positions) for part in prepared.parts)
    watch(0, total, 0)
    assert config.judge is not None
    for batch in batches(prepared.parts, size=BATCH_POOLS):
        if prepared.tokenizer is not None:
            for ledger, record in batch:
                check_tokenizer(
                    prepared.tokenizer, config.data.tokenizer, ledger=ledger, record=record
                )
        _refuse_to_spend(config.judge.limit, results)
        pools = [record.pool for _, record in batch]
        rewards, verdicts, counts = judge.judge_pools(pools, seed=config.run.seed)
        add_counts(results.costs, counts)
        rows = []
        for (ledger, record), new, known in zip(batch, rewards, verdicts, strict=True):
            _compare(record, new, results)
            rows += _rows(ledger, record, new, known)
        watch(len(results.pools), total, int(results.costs["verdicts"]))
        yield rows


def _refuse_to_spend(limit: SpendLimit, results: Results) -> None:
    """Raises: RunFailed once this command has spent judge.limit."""
    spent = dict(results.costs)
    add_counts(spent, results.calibration_costs)
    tokens = spent.get("prompt_tokens", 0) + spent.get("completion_tokens", 0)
    sums = {"questions": spent.get("paid", 0), "tokens": tokens, "money": spent.get("money", 0)}
    for name, most in limit.model_dump().items():
        if most is not None and sums[name] >= most:
            raise RunFailed(
                f"judge.limit.{name}: {sums[name]:,.6g} are spent after {len(results.pools)} "
                f"pools, the limit is {most:,.6g}; raise it and give the same command, which pays "
                "for no verdict twice"
            )


def _compare(record: PoolRecord, new: PoolRewards, results: Results) -> None:
    old = record.rewards
    found = agreement(standing(old), standing(new), pairs=live_pairs(record.picks))
    results.pools.append(found)
    results.steps.append(record.step)
    results.documents.append(record.pool.sample.document_id)
    for i in np.flatnonzero(old.valid & new.valid):
        source = record.pool.candidates[i].source
        results.points.append((source, float(old.total[i]), float(new.total[i])))


def _rows(
    ledger: Ledger, record: PoolRecord, new: PoolRewards, verdicts: Sequence[Verdict]
) -> list[dict[str, Any]]:
    """One row a candidate."""
    old, sample = record.rewards, record.pool.sample
    rows = []
    for c, candidate in enumerate(record.pool.candidates):
        mine = [v for v in verdicts if c in (v.candidate, v.opponent)]
        rows.append(
            {
                "run": ledger.name, "step": record.step, "position": record.position,
                "sample_id": sample.sample_id, "document_id": sample.document_id,
                "candidate": c, "source": candidate.source,
                "reward_ledger": float(old.total[c]) if old.valid[c] else None,
                "reward_new": float(new.total[c]) if new.valid[c] else None,
                "passes_ledger": bool(old.passes[c]), "passes_new": bool(new.passes[c]),
                "by_criterion": [
                    {"name": name, "score": None if np.isnan(s[c]) else float(s[c])}
                    for name, s in new.by_criterion.items()
                ],
                "verdicts": len(mine), "missing": sum(v.score is None for v in mine),
            }
        )  # fmt: skip
    return rows


def _calibrate(
    config: Config, path: Path, prepared: Prepared, opened: JudgeServers, results: Results
) -> None:
    """Judge the labelled pairs of a file, each in both orders."""
    assert config.judge is not None
    pairs, criteria = read_pairs(path), config.judge.criteria
    changes = {"both_orders": 1.0, "schedule": AllPairs(name="all_pairs")}
    settings = config.judge.model_copy(update=changes)
    judge = Judge(
        criteria,
        servers=opened.servers,
        cache=opened.cache,
        settings=settings,
        prefix_text=prefix_text_of(pairs, prepared.tokenizer),
        suffix_text=lambda sample: pairs[sample.sample_id].suffix or "",
        novelty=prepared.novelty,
    )
    rewards, verdicts, counts = judge.judge_pools(
        pools_of(pairs, prepared.tokenizer), seed=config.run.seed
    )
    results.calibration_costs = counts
    results.accuracies = accuracies(
        pairs,
        rewards,
        verdicts,
        criteria=criteria,
        resamples=config.evaluation.bootstrap,
        seed=config.run.seed,
    )


def add_counts(sums: dict[str, float], counts: dict[str, float]) -> None:
    """Add what one call of a judge counted."""
    for name, value in counts.items():
        sums[name] = sums.get(name, 0) + value
