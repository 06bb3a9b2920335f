"""The ledger: every candidate of every committed step, as Parquet; what happened, replayable.

One row is one candidate, read as it is by pandas or DuckDB; what belongs to the whole prefix is
repeated in its rows. A row with candidate -1 is one that left its pool before it was judged, with
the reason in `guard`. `verdicts` and `picks` of a candidate stand in its row (those of the sample
itself, candidate < 0, in the first), with `order`, their place in the pool's list. No pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sip.publish import atomic_write
from megatron_sip.types import Candidate, CandidatePool, Pick, PoolRewards, SipSample, Verdict

SCHEMA_VERSION = 2
_READ = (1, 2)  # 1: before gates, guards and both orders
_I32, _I64, _F32, _F64, _TEXT = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()
_VERDICT = {"order": _I32, "criterion": _TEXT, "candidate": _I32, "opponent": _I32, "vote": _I32,
            "score": _F64, "reply": _TEXT, "candidate_first": pa.bool_()}  # fmt: skip
_PICK = {"order": _I32, "candidate": _I32, "role": _TEXT, "advantage": _F64, "weight": _F64}
_COLUMNS = {
    "step": _I64, "position": _I64, "sample_id": _I64, "document_id": _I64, "cut": _I64,
    "prefix_ids": pa.list_(_I32), "suffix_ids": pa.list_(_I32), "prefix_text": _TEXT,
    "chance_rollout": _F64, "num_missing": _I64, "candidate": _I32, "source": _TEXT,
    "token_ids": pa.list_(_I32), "text": _TEXT, "logprobs": pa.list_(_F32),
    "policy_version": _I64, "finish_reason": _TEXT, "guard": _TEXT, "reward": _F32,
    "valid": pa.bool_(), "passes": pa.bool_(),
    "by_criterion": pa.list_(pa.struct({"name": _TEXT, "score": _F32})),
    "verdicts": pa.list_(pa.struct(_VERDICT)), "picks": pa.list_(pa.struct(_PICK)),
}  # fmt: skip
SPENT = b"megatron_sip.spent"
SCHEMA = pa.schema(_COLUMNS, metadata={"megatron_sip.pools": str(SCHEMA_VERSION)})


@dataclass(frozen=True)
class PoolRecord:
    """One pool of one step with all that was said and decided about it."""

    step: int
    position: int  # index of the prompt in the global batch
    pool: CandidatePool
    rewards: PoolRewards
    verdicts: tuple[Verdict, ...]
    picks: tuple[Pick, ...]


def write_pools(
    run_dir: Path,
    step: int,
    *,
    dp_rank: int,
    records: Sequence[PoolRecord],
    spent: Mapping[str, float] | None = None,
) -> None:
    """Write pools/step_00000012.dp0.parquet, whole or not at all.

    A shard that an uncommitted earlier try left is replaced.

    Args:   spent: what the verdicts of this shard cost, by name.
    Raises: ValueError if the step is committed already (the ledger is never rewritten), or if a
            record is of another step, lacks candidates, or names one that its pool does not have.
    """
    _refuse_committed(run_dir / "pools", step)
    rows = [row for record in records for row in _rows(record, step)]
    buffer = io.BytesIO()
    schema = SCHEMA.with_metadata((SCHEMA.metadata or {}) | {SPENT: json.dumps(dict(spent or {}))})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    atomic_write(_shard(run_dir / "pools", step, dp_rank), buffer.getvalue())


def commit_step(run_dir: Path, step: int, *, num_shards: int) -> None:
    """Write pools/step_00000012.done. Call it on one rank once all have written (a barrier).

    Shards beyond `num_shards`, which an uncommitted try at a larger size left, are removed.

    Raises: ValueError if the step is committed already or a shard is missing.
    """
    marker = _refuse_committed(run_dir / "pools", step)
    shards = []
    for dp_rank in range(num_shards):
        path = _shard(run_dir / "pools", step, dp_rank)
        if not path.exists():
            raise ValueError(f"{path}: missing, so step {step} cannot be committed; write it first")
        data = path.read_bytes()
        shards.append({"file": path.name, "bytes": len(data), "sha256": _digest(data)})
    known = {shard["file"] for shard in shards}
    for path in (run_dir / "pools").glob(f"step_{step:08d}.dp*.parquet"):
        if path.name not in known:
            path.unlink()
    content = {"schema_version": SCHEMA_VERSION, "step": step, "shards": shards}
    atomic_write(marker, json.dumps(content, indent=2).encode())


def read_pools(pools_dir: Path, step: int, *, dp_rank: int, dp_size: int) -> list[PoolRecord]:
    """This replica's slice of a committed step, whatever the layout that recorded it.

    Returns: records by position, `dp_rank`'s contiguous part of the global batch.
    Raises:  ValueError if the step is not committed, of another schema version, damaged,
             incomplete, or not divisible by `dp_size`.
    """
    marker = _marker(pools_dir, step)
    if not marker.exists():
        raise ValueError(f"{marker}: missing, so step {step} is not committed; make it anew")
    try:
        content = json.loads(marker.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{marker}: not valid JSON ({error}); restore it from a copy") from None
    _check_version(marker, content.get("schema_version"))
    records: list[PoolRecord] = []
    for i, shard in enumerate(content["shards"]):
        records += _read_shard(_shard(pools_dir, step, i), shard["sha256"])
    records.sort(key=lambda record: record.position)
    positions = [record.position for record in records]
    if positions != list(range(len(records))):
        raise ValueError(
            f"{marker}: positions {positions} are not 0..{len(records) - 1}, each once; a replica "
            "wrote another's prompts: make the step anew"
        )
    if len(records) % dp_size:
        raise ValueError(
            f"{marker}: {len(records)} pools cannot be split evenly over data-parallel size "
            f"{dp_size}; choose a divisor"
        )
    share = len(records) // dp_size
    return records[dp_rank * share : (dp_rank + 1) * share]


def read_spent(pools_dir: Path, step: int) -> dict[str, float]:
    """What the verdicts of a committed step cost, all shards together."""
    total: dict[str, float] = {}
    for shard in json.loads(_marker(pools_dir, step).read_text())["shards"]:
        metadata = pq.read_schema(pools_dir / shard["file"]).metadata or {}
        for name, value in json.loads(metadata.get(SPENT, b"{}")).items():
            total[name] = total.get(name, 0.0) + value
    return total


def num_committed(pools_dir: Path, *, first: int = 0) -> int:
    """The first step from `first` on that is not committed."""
    step = first
    while _marker(pools_dir, step).exists():
        step += 1
    return step


def pool_bytes(run_dir: Path, step: int) -> int:
    """Size of a step's pools; 0 if there are none."""
    return sum(p.stat().st_size for p in (run_dir / "pools").glob(f"step_{step:08d}.*"))


def prune_pools(run_dir: Path, *, before: int) -> None:
    """Remove the pools of all steps before `before`, the oldest first, each one's marker first."""
    for marker in sorted((run_dir / "pools").glob("step_*.done")):
        if int(marker.stem.removeprefix("step_")) >= before:
            break
        marker.unlink()
        for shard in marker.parent.glob(f"{marker.stem}.dp*.parquet"):
            shard.unlink()


def _shard(folder: Path, step: int, dp_rank: int) -> Path:
    return folder / f"step_{step:08d}.dp{dp_rank}.parquet"


def _marker(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.done"


def _refuse_committed(folder: Path, step: int) -> Path:
    """The marker's path; ValueError if it is there."""
    marker = _marker(folder, step)
    if marker.exists():
        raise ValueError(f"{marker}: step {step} is committed; replay it, or remove the marker")
    return marker


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_version(path: Path, found: Any) -> None:
    if found not in _READ:
        raise ValueError(
            f"{path}: schema version {found}, this release reads {' and '.join(map(str, _READ))}; "
            "read it with the release that wrote it"
        )


def _rows(record: PoolRecord, step: int) -> list[dict[str, Any]]:
    """One row a candidate, then one for each that a guard stopped."""
    pool, rewards, number = record.pool, record.rewards, len(record.pool.candidates)
    named = [x.candidate for x in (*record.verdicts, *record.picks)]
    if record.step != step or not number or max(named, default=0) >= number:
        raise ValueError(
            f"step {step}, position {record.position}: the record is of step {record.step} with "
            f"{number} candidates and names candidate {max(named, default=0)}; it must be of this "
            "step, have candidates and name only those"
        )
    scores = rewards.by_criterion.items()
    shared = {
        "step": step, "position": record.position, **asdict(pool.sample),
        "prefix_text": pool.prefix_text, "chance_rollout": pool.chance_rollout,
        "num_missing": rewards.num_missing,
    }  # fmt: skip
    return [
        {
            **shared, "candidate": c, **asdict(candidate),
            "reward": rewards.total[c], "valid": bool(rewards.valid[c]),
            "passes": bool(rewards.passes[c]),
            "by_criterion": [{"name": name, "score": values[c]} for name, values in scores],
            "verdicts": _at_home(record.verdicts, c), "picks": _at_home(record.picks, c),
        }
        for c, candidate in enumerate(pool.candidates)
    ] + [
        {**shared, "candidate": -1, **asdict(candidate), "reward": None, "valid": False,
         "passes": False, "by_criterion": [], "verdicts": [], "picks": []}
        for candidate in pool.guarded
    ]  # fmt: skip


def _at_home(items: Sequence[Verdict | Pick], candidate: int) -> list[dict[str, Any]]:
    return [
        {"order": i, **asdict(item)}
        for i, item in enumerate(items)
        if max(item.candidate, 0) == candidate
    ]


def _in_order(column: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    items = sorted((item for row in column for item in row), key=lambda item: item["order"])
    return [{k: v for k, v in item.items() if k != "order"} for item in items]


def _read_shard(path: Path, digest: str) -> list[PoolRecord]:
    """Verified records of one shard, in the order of the file."""
    if not path.exists():
        raise ValueError(f"{path}: missing, though its step is committed; restore it from a copy")
    data = path.read_bytes()
    if _digest(data) != digest:
        raise ValueError(f"{path}: SHA-256 differs from the marker's; restore it from a copy")
    table = pq.ParquetFile(io.BytesIO(data)).read()
    _check_version(path, int((table.schema.metadata or {}).get(b"megatron_sip.pools", 0)))
    starts = np.flatnonzero(table["candidate"].to_numpy() == 0).tolist()
    ends = [*starts[1:], len(table)]
    return [_record(table.slice(s, e - s)) for s, e in zip(starts, ends, strict=True)]


def _record(rows: pa.Table) -> PoolRecord:
    """The record whose candidates, and those that left, are `rows`."""
    number = int((rows["candidate"].to_numpy() >= 0).sum())
    everyone, rows = _candidates(rows), rows.slice(0, number)

    def every(name: str) -> list[Any]:
        return rows[name].to_pylist()

    def one(name: str) -> Any:
        return rows[name][0].as_py()

    sample = SipSample(
        sample_id=one("sample_id"), document_id=one("document_id"), cut=one("cut"),
        prefix_ids=rows["prefix_ids"][0].values.to_numpy().copy(),
        suffix_ids=rows["suffix_ids"][0].values.to_numpy().copy(),
    )  # fmt: skip
    scores, valid = every("by_criterion"), np.array(every("valid"), bool)
    rewards = PoolRewards(
        by_criterion={
            item["name"]: np.array([row[i]["score"] for row in scores], np.float32)
            for i, item in enumerate(scores[0])
        },
        total=rows["reward"].to_numpy().copy(),
        valid=valid,
        num_missing=one("num_missing"),
        passes=np.array(every("passes"), bool) if "passes" in rows.column_names else valid,
    )
    verdicts = tuple(Verdict(**item) for item in _in_order(every("verdicts")))
    picks = tuple(Pick(**item) for item in _in_order(every("picks")))
    pool = CandidatePool(
        sample, one("prefix_text"), everyone[:number], one("chance_rollout"), everyone[number:]
    )
    return PoolRecord(one("step"), one("position"), pool, rewards, verdicts, picks)


def _candidates(rows: pa.Table) -> tuple[Candidate, ...]:
    def arrays(name: str) -> list[np.ndarray]:
        return [value.values.to_numpy().copy() for value in rows[name]]

    fields = ("source", "token_ids", "text", "logprobs", "policy_version", "finish_reason", "guard")
    columns = [
        arrays(f) if f in ("token_ids", "logprobs") else rows[f].to_pylist()
        for f in fields
        if f in rows.column_names
    ]
    return tuple(Candidate(*values) for values in zip(*columns, strict=True))
