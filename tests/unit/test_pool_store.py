"""The ledger gives back bit for bit what it was given, in any layout, or says why it cannot."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sip import pool_store
from megatron_sip.pool_store import PoolRecord, commit_step, read_pools, read_spent, write_pools
from megatron_sip.types import Candidate, CandidatePool, Pick, PoolRewards, SipSample, Verdict

STEP = 12


def make_record(position: int, *, step: int = STEP) -> PoolRecord:
    generator = np.random.default_rng(position)
    sample = SipSample(
        sample_id=2**40 + position,
        document_id=7,
        cut=5,
        prefix_ids=generator.integers(0, 2**31 - 1, 5).astype(np.int32),
        suffix_ids=np.array([1, 2, 3], np.int32),
    )
    odd = np.array([-0.0, np.nan, -np.inf, 1e-45, np.float32(-0.1), -87.25], np.float32)
    candidates = (
        Candidate("rewrite", np.array([9, 2], np.int32), "", np.zeros(0, np.float32), -1, "stop"),
        Candidate("rollout", np.arange(6, dtype=np.int32), "it's\n ü 😀", odd, 3, "length"),
        Candidate("rollout", np.zeros(0, np.int32), "x", np.zeros(0, np.float32), 3, "stop"),
    )
    rewards = PoolRewards(
        by_criterion={
            "safety": np.array([np.nan, 0.1, -0.0], np.float32),
            "likelihood": np.array([-1.5, np.nan, 1 / 3], np.float32),
        },
        total=np.array([np.nan, 0.1, 0.2], np.float32),
        valid=np.array([False, True, True]),
        num_missing=2,
        passes=np.array([False, True, False]),
    )
    verdicts = (
        Verdict("safety", 2, -1, 0, 1 / 3, "yes"),
        Verdict("safety", 0, 1, 1, None, "refused", False),
        Verdict("likelihood", 2, -1, 0, 0.0, ""),
        Verdict("likelihood", 1, -1, 0, -1e300, ""),
    )
    picks = (
        Pick(2, "chosen", 0.1, 1.0),
        Pick(1, "rejected", -0.1, 0.0),
        Pick(-2, "target", 0.0, 1.0),
        Pick(-1, "prefix", 0.0, 1.0),
    )
    guarded = (
        Candidate("rollout", np.array([4, 4], np.int32), "no no", odd[:2], 3, "stop", "repetition"),
        Candidate(
            "rollout", np.zeros(0, np.int32), "", np.zeros(0, np.float32), 3, "stop", "empty"
        ),
    )
    pool = CandidatePool(sample, f"prefix {position}", candidates, 2 / 3, guarded[: position % 3])
    return PoolRecord(step, position, pool, rewards, verdicts, picks)


def assert_identical(left: object, right: object) -> None:
    """Equal in type, dtype, order and every bit."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, dict) and isinstance(right, dict):
        assert list(left) == list(right)
        for key in left:
            assert_identical(left[key], right[key])
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_identical(a, b)
    elif hasattr(left, "__dataclass_fields__"):
        for field in fields(left):  # pyright: ignore[reportArgumentType]
            assert_identical(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


def record_step(run_dir: Path, *, dp_size: int, num_pools: int = 4) -> list[PoolRecord]:
    (run_dir / "pools").mkdir(parents=True, exist_ok=True)
    records = [make_record(i) for i in range(num_pools)]
    share = num_pools // dp_size
    for r in range(dp_size):
        write_pools(run_dir, STEP, dp_rank=r, records=records[r * share : (r + 1) * share])
    commit_step(run_dir, STEP, num_shards=dp_size)
    return records


@pytest.mark.parametrize("recorded_at", [1, 2, 4])
@pytest.mark.parametrize("replayed_at", [1, 2, 4])
def test_round_trip_is_exact_at_any_data_parallel_size(
    tmp_path: Path, recorded_at: int, replayed_at: int
) -> None:
    records = record_step(tmp_path, dp_size=recorded_at)
    parts = [
        read_pools(tmp_path / "pools", STEP, dp_rank=r, dp_size=replayed_at)
        for r in range(replayed_at)
    ]
    assert {len(part) for part in parts} == {4 // replayed_at}
    assert_identical([record for part in parts for record in part], records)


def test_pools_are_ordered_by_position_not_by_writer(tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    for rank, positions in enumerate([(3, 0), (2, 1)]):
        records = [make_record(p) for p in positions]
        write_pools(tmp_path, STEP, dp_rank=rank, records=records)
    commit_step(tmp_path, STEP, num_shards=2)
    read = read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)
    assert [record.position for record in read] == [0, 1, 2, 3]


def test_arrays_read_are_writable_copies(tmp_path: Path) -> None:
    record_step(tmp_path, dp_size=1)
    record = read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)[0]
    sample, candidate = record.pool.sample, record.pool.candidates[1]
    arrays = (sample.prefix_ids, candidate.token_ids, candidate.logprobs, record.rewards.total)
    assert all(a.flags.writeable and a.flags.owndata for a in arrays)


def test_every_field_of_the_data_objects_has_a_column() -> None:
    columns = set(pool_store.SCHEMA.names)
    assert {f.name for f in (*fields(SipSample), *fields(Candidate))} <= columns
    for column, kind in (("verdicts", Verdict), ("picks", Pick)):
        struct = pool_store.SCHEMA.field(column).type.value_type
        assert {struct.field(i).name for i in range(struct.num_fields)} == {
            "order", *(f.name for f in fields(kind))
        }  # fmt: skip


def test_table_has_one_plain_row_a_candidate(tmp_path: Path) -> None:
    record_step(tmp_path, dp_size=1)
    path = tmp_path / "pools" / "step_00000012.dp0.parquet"
    file = pq.ParquetFile(path)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    rows = file.read().to_pylist()
    assert [(r["position"], r["candidate"]) for r in rows[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert rows[1]["text"] == "it's\n ü 😀" and rows[1]["source"] == "rollout"
    assert [p["role"] for p in rows[2]["picks"]] == ["chosen"]
    assert [p["role"] for p in rows[0]["picks"]] == ["target", "prefix"]


def test_uncommitted_step_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    write_pools(tmp_path, STEP, dp_rank=0, records=[make_record(0)])
    with pytest.raises(ValueError, match=r"step_00000012\.done: missing.*not committed"):
        read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)


def test_commit_waits_for_every_shard(tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    write_pools(tmp_path, STEP, dp_rank=0, records=[make_record(0)])
    with pytest.raises(ValueError, match=r"dp1\.parquet: missing"):
        commit_step(tmp_path, STEP, num_shards=2)
    assert not (tmp_path / "pools" / "step_00000012.done").exists()


def test_lost_shard_and_changed_shard_are_named(tmp_path: Path) -> None:
    record_step(tmp_path, dp_size=2)
    shard = tmp_path / "pools" / "step_00000012.dp1.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"dp1\.parquet: SHA-256 differs"):
        read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)
    shard.unlink()
    with pytest.raises(ValueError, match=r"dp1\.parquet: missing"):
        read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)


def test_other_schema_version_is_refused_in_marker_and_in_shard(tmp_path: Path) -> None:
    record_step(tmp_path, dp_size=1)
    pools = tmp_path / "pools"
    marker, shard = pools / "step_00000012.done", pools / "step_00000012.dp0.parquet"
    table = pq.ParquetFile(shard).read()
    pq.write_table(table.replace_schema_metadata({"megatron_sip.pools": "3"}), shard)
    marker.unlink()
    commit_step(tmp_path, STEP, num_shards=1)
    with pytest.raises(ValueError, match=r"dp0\.parquet: schema version 3, this release reads 1"):
        read_pools(pools, STEP, dp_rank=0, dp_size=1)
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema_version": 3}))
    with pytest.raises(ValueError, match=r"done: schema version 3, this release reads 1"):
        read_pools(pools, STEP, dp_rank=0, dp_size=1)
    marker.write_text("{")
    with pytest.raises(ValueError, match=r"done: not valid JSON"):
        read_pools(pools, STEP, dp_rank=0, dp_size=1)


def test_a_ledger_of_version_1_is_read_without_gates_guards_and_orders(tmp_path: Path) -> None:
    records = record_step(tmp_path, dp_size=1)
    pools = tmp_path / "pools"
    marker, shard = pools / "step_00000012.done", pools / "step_00000012.dp0.parquet"
    rows = [
        {k: v for k, v in row.items() if k not in ("guard", "passes")}
        | {"verdicts": [{k: x[k] for k in x if k != "candidate_first"} for x in row["verdicts"]]}
        for row in pq.ParquetFile(shard).read().to_pylist()
        if row["candidate"] >= 0
    ]
    old = pool_store.SCHEMA
    for name in ("guard", "passes"):
        old = old.remove(old.get_field_index(name))
    verdict = {k: v for k, v in pool_store._VERDICT.items() if k != "candidate_first"}
    field = pa.field("verdicts", pa.list_(pa.struct(verdict)))
    old = old.set(old.get_field_index("verdicts"), field)
    old = old.with_metadata({"megatron_sip.pools": "1"})
    pq.write_table(pa.Table.from_pylist(rows, schema=old), shard)
    marker.unlink()
    commit_step(tmp_path, STEP, num_shards=1)
    for was, now in zip(records, read_pools(pools, STEP, dp_rank=0, dp_size=1), strict=True):
        assert_identical(now.rewards, replace(was.rewards, passes=was.rewards.valid))
        assert_identical(now.pool, replace(was.pool, guarded=()))
        assert [v.score for v in now.verdicts] == [v.score for v in was.verdicts]
        assert all(v.candidate_first for v in now.verdicts)


def test_what_a_step_cost_is_kept_and_added_up(tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    for rank, spent in enumerate([{"paid": 3.0, "money": 0.5}, {"paid": 4.0}]):
        write_pools(tmp_path, STEP, dp_rank=rank, records=[make_record(rank)], spent=spent)
    commit_step(tmp_path, STEP, num_shards=2)
    assert read_spent(tmp_path / "pools", STEP) == {"paid": 7.0, "money": 0.5}
    assert len(read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)) == 2


def test_foreign_parquet_has_no_schema_version(tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "pools" / "step_00000012.dp0.parquet")
    commit_step(tmp_path, STEP, num_shards=1)
    with pytest.raises(ValueError, match="schema version 0"):
        read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)


def test_committed_step_is_never_rewritten(tmp_path: Path) -> None:
    records = record_step(tmp_path, dp_size=1)
    with pytest.raises(ValueError, match="step 12 is committed"):
        write_pools(tmp_path, STEP, dp_rank=0, records=records[:1])
    with pytest.raises(ValueError, match="step 12 is committed"):
        commit_step(tmp_path, STEP, num_shards=1)


def test_shards_of_an_unfinished_wider_try_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    write_pools(tmp_path, STEP, dp_rank=3, records=[make_record(9)])
    write_pools(tmp_path, STEP + 1, dp_rank=3, records=[make_record(9, step=STEP + 1)])
    record_step(tmp_path, dp_size=1)
    names = sorted(p.name for p in (tmp_path / "pools").iterdir())
    assert names == ["step_00000012.done", "step_00000012.dp0.parquet", "step_00000013.dp3.parquet"]


@pytest.mark.parametrize("positions", [(0, 0), (0, 2), (1, 2)])
def test_positions_that_do_not_cover_the_batch_are_refused(
    tmp_path: Path, positions: tuple[int, int]
) -> None:
    (tmp_path / "pools").mkdir()
    write_pools(tmp_path, STEP, dp_rank=0, records=[make_record(p) for p in positions])
    commit_step(tmp_path, STEP, num_shards=1)
    with pytest.raises(ValueError, match=r"are not 0\.\.1, each once"):
        read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=1)


def test_batch_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    record_step(tmp_path, dp_size=1)
    with pytest.raises(
        ValueError, match="4 pools cannot be split evenly over data-parallel size 3"
    ):
        read_pools(tmp_path / "pools", STEP, dp_rank=0, dp_size=3)


def test_record_that_would_lose_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    good = make_record(0)
    empty = replace(good, pool=replace(good.pool, candidates=()), verdicts=(), picks=())
    stray = replace(good, picks=(Pick(3, "chosen", 0.0, 1.0),))
    for bad in (empty, stray, make_record(0, step=11)):
        with pytest.raises(ValueError, match="step 12, position 0"):
            write_pools(tmp_path, STEP, dp_rank=0, records=[bad])
    assert not list((tmp_path / "pools").iterdir())
