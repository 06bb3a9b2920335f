"""Picks -> training rows, one micro-batch of pools at a time. Pure.

A candidate is a *branch* behind its prefix: inputs [last prefix token, candidate less its last
token], labels [candidate], positions from P - 1 on. Before it stand the prefix's P - 1 others.
`padded`: each branch has a row of its own, with its own copy of the prefix. `shared_prefix`: a pool
is one row, [P - 1 prefix tokens, branch 1, branch 2, ...]; `branch_ids` say who may see whom.
The pool's (first) row also holds the prefix as a segment when the objective trains on it. All rows
of a pool stand in one micro-batch, so a pair is never parted.

Legend: R rows, S row length, P prefix length, L candidate length, M segments, Q pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, PREFIX
from megatron_sip.types import ROLES, CandidatePool, Pick, RowLayout, TrainRows


def row_length(prefix_tokens: int, suffix_tokens: int, multiple: int) -> int:
    """S of padded rows: longest prefix and suffix less the last token, rounded up to `multiple`."""
    return round_up(prefix_tokens + suffix_tokens - 1, multiple)


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def shared_row_length(
    pools: Sequence[CandidatePool], picks: Sequence[Sequence[Pick]], multiple: int
) -> int:
    """S of rows that share a prefix: the longest of them, rounded up to `multiple`."""
    longest = 1
    for pool, of_pool in zip(pools, picks, strict=True):
        tokens = sum(len(_member(pool, p)[0]) for p in of_pool if p.candidate != PREFIX)
        longest = max(longest, len(pool.sample.prefix_ids) - 1 + tokens)
    return round_up(longest, multiple)


def _member(pool: CandidatePool, pick: Pick) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids int32[L], engine log-probs float32[L or 0] and policy version of a pick."""
    if pick.candidate == ORIGINAL_SUFFIX:
        return pool.sample.suffix_ids, np.zeros(0, np.float32), -1
    candidate = pool.candidates[pick.candidate]
    return candidate.token_ids, candidate.logprobs, candidate.policy_version


class _Builder:
    """Arrays of one micro-batch while its rows are written."""

    def __init__(self, num_rows: int, length: int, pad: int) -> None:
        self.tokens = np.full((num_rows, length), pad, np.int64)
        self.labels = np.full((num_rows, length), pad, np.int64)
        self.position_ids = np.tile(np.arange(length), (num_rows, 1))
        self.branch_ids = np.full((num_rows, length), -1, np.int32)
        self.segment_ids = np.full((num_rows, length), -1, np.int32)
        self.rollout_logprobs = np.zeros((num_rows, length), np.float32)
        self.segments: list[tuple[int, Pick, int]] = []  # group, pick, policy version
        self.pairs: list[list[int]] = []  # [chosen m, rejected m]

    def put(self, row: int, column: int, ids: np.ndarray, *, position: int, branch: int) -> slice:
        """Inputs ids[:-1] with labels ids[1:] from `column` on; returns where they stand."""
        where = slice(column, column + len(ids) - 1)
        self.tokens[row, where] = ids[:-1]
        self.labels[row, where] = ids[1:]
        self.position_ids[row, where] = np.arange(position, position + len(ids) - 1)
        self.branch_ids[row, where] = branch
        return where

    def add_segment(self, row: int, where: slice, group: int, pick: Pick, version: int) -> None:
        """Mark labels of a row as a new segment, and as half of a pair."""
        m = len(self.segments)
        self.segment_ids[row, where] = m
        self.segments.append((group, pick, version))
        if pick.role == "chosen":
            self.pairs.append([m])
        elif pick.role == "rejected":
            self.pairs[-1].append(m)

    def add_pool(
        self, row: int, group: int, pool: CandidatePool, picks: Sequence[Pick], layout: RowLayout
    ) -> int:
        """Write a pool from `row` on; returns the first row behind it."""
        prefix, first = pool.sample.prefix_ids, row
        column = before = len(prefix) - 1
        for n, pick in enumerate(p for p in picks if p.candidate != PREFIX):
            ids, logprobs, version = _member(pool, pick)
            if n and layout == "padded":
                row, column = row + 1, before
            if column + len(ids) > self.tokens.shape[1]:
                raise ValueError(
                    f"sample {pool.sample.sample_id}: prefix {len(prefix)} + candidate {len(ids)} "
                    f"tokens do not fit a row of {self.tokens.shape[1]} positions"
                )
            if not n or layout == "padded":
                self.put(row, 0, prefix, position=0, branch=0)
            branch = np.concatenate([prefix[-1:], ids])
            number = n + 1 if layout == "shared_prefix" else 0
            where = self.put(row, column, branch, position=before, branch=number)
            if len(logprobs):
                self.rollout_logprobs[row, where] = logprobs
            self.add_segment(row, where, group, pick, version)
            column = where.stop
        for pick in picks:
            if pick.candidate == PREFIX:
                self.add_segment(first, slice(0, before), group, pick, -1)
        return row + 1


def make_rows(
    pools: Sequence[CandidatePool],
    picks: Sequence[Sequence[Pick]],
    *,
    length: int,
    pad: int,
    layout: RowLayout = "padded",
    num_rows: int = 0,
) -> TrainRows:
    """One micro-batch of rows.

    Args:    pools, picks: the micro-batch's pools and what to train on of each.
             length: S; pad: token id of empty positions (never scored).
             num_rows: at least so many rows, the last of them empty.
    Returns: rows on the CPU, without reference log-probs.
    Raises:  ValueError if a sequence is longer than a row.
    """
    builder = _Builder(max(num_rows, rows_needed(picks, layout)), length, pad)
    row = 0
    for group, (pool, of_pool) in enumerate(zip(pools, picks, strict=True)):
        row = builder.add_pool(row, group, pool, of_pool, layout)
    groups, chosen, versions = zip(*builder.segments, strict=True)
    branched = builder.branch_ids if layout == "shared_prefix" else builder.branch_ids[:, :0]
    return TrainRows(
        tokens=torch.from_numpy(builder.tokens),
        labels=torch.from_numpy(builder.labels),
        position_ids=torch.from_numpy(builder.position_ids),
        branch_ids=torch.from_numpy(branched.copy()),
        segment_ids=torch.from_numpy(builder.segment_ids),
        roles=torch.tensor([ROLES.index(pick.role) for pick in chosen]),
        advantages=torch.tensor([pick.advantage for pick in chosen], dtype=torch.float32),
        weights=torch.tensor([pick.weight for pick in chosen], dtype=torch.float32),
        group_ids=torch.tensor(groups),
        policy_versions=torch.tensor(versions),
        pairs=torch.tensor(builder.pairs, dtype=torch.int64).reshape(-1, 2),
        rollout_logprobs=torch.from_numpy(builder.rollout_logprobs),
        reference_logprobs=torch.zeros(builder.tokens.shape),
    )


def rows_needed(picks: Sequence[Sequence[Pick]], layout: RowLayout) -> int:
    """R of a micro-batch: a row for each pool, or for each candidate."""
    if layout == "shared_prefix":
        return len(picks)
    return sum(pick.candidate != PREFIX for of_pool in picks for pick in of_pool)


def make_micro_batches(
    pools: Sequence[CandidatePool],
    picks: Sequence[Sequence[Pick]],
    *,
    micro_batch_size: int,
    layout: RowLayout,
    length: int,
    multiple: int,
    pad: int,
) -> list[TrainRows]:
    """Rows of all pools of this rank, `micro_batch_size` pools at a time, all of one shape.

    Args: length: S of padded rows; rows that share a prefix are as long as the longest needs, a
          multiple of `multiple`.
    """
    if layout == "shared_prefix":
        length = shared_row_length(pools, picks, multiple)
    cuts = [slice(i, i + micro_batch_size) for i in range(0, len(pools), micro_batch_size)]
    num_rows = max(rows_needed(picks[cut], layout) for cut in cuts)
    return [
        make_rows(pools[cut], picks[cut], length=length, pad=pad, layout=layout, num_rows=num_rows)
        for cut in cuts
    ]
