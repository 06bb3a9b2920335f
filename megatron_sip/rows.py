"""Picks -> padded training rows, one micro-batch of pools at a time. Pure.

A padded row is [prefix, candidate] without its last token; the label of position t is token t + 1.
The first row of a pool also holds the prefix as a segment when the objective trains on it. All
rows of a pool stand in one micro-batch, so a pair is never parted.

Legend: R rows, S row length, P prefix length, L candidate length, M segments, Q pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, PREFIX
from megatron_sip.types import ROLES, CandidatePool, Pick, TrainRows


def row_length(prefix_tokens: int, suffix_tokens: int, multiple: int) -> int:
    """S: longest prefix and suffix less the last token, rounded up to `multiple`."""
    return -(-(prefix_tokens + suffix_tokens - 1) // multiple) * multiple


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
        self.segment_ids = np.full((num_rows, length), -1, np.int32)
        self.rollout_logprobs = np.zeros((num_rows, length), np.float32)
        self.segments: list[tuple[int, Pick, int]] = []  # group, pick, policy version
        self.row = 0

    def add_segment(self, group: int, pick: Pick, start: int, stop: int, version: int) -> int:
        """Mark labels [start, stop) of the present row as a new segment; returns its index."""
        self.segment_ids[self.row, start:stop] = len(self.segments)
        self.segments.append((group, pick, version))
        return len(self.segments) - 1

    def add_pool(self, group: int, pool: CandidatePool, picks: Sequence[Pick]) -> list[list[int]]:
        """Write a pool's rows; returns its pairs as [chosen m, rejected m]."""
        prefix = pool.sample.prefix_ids
        first, pairs = self.row, []
        for pick in picks:
            if pick.candidate == PREFIX:
                continue
            ids, logprobs, version = _member(pool, pick)
            sequence = np.concatenate([prefix, ids])
            width, start = len(sequence) - 1, len(prefix) - 1
            if width > self.tokens.shape[1]:
                raise ValueError(
                    f"sample {pool.sample.sample_id}: prefix {len(prefix)} + candidate {len(ids)} "
                    f"tokens do not fit a row of {self.tokens.shape[1]} positions"
                )
            self.tokens[self.row, :width] = sequence[:-1]
            self.labels[self.row, :width] = sequence[1:]
            if len(logprobs):
                self.rollout_logprobs[self.row, start:width] = logprobs
            m = self.add_segment(group, pick, start, width, version)
            if pick.role == "chosen":
                pairs.append([m])
            elif pick.role == "rejected":
                pairs[-1].append(m)
            self.row += 1
        last, self.row = self.row, first
        for pick in picks:
            if pick.candidate == PREFIX:
                self.add_segment(group, pick, 0, len(prefix) - 1, -1)
        self.row = last
        return pairs


def make_rows(
    pools: Sequence[CandidatePool],
    picks: Sequence[Sequence[Pick]],
    *,
    length: int,
    pad: int,
) -> TrainRows:
    """One micro-batch of padded rows.

    Args:    pools, picks: the micro-batch's pools and what to train on of each.
             length: S; pad: token id of empty positions (never scored).
    Returns: rows on the CPU, without reference log-probs.
    Raises:  ValueError if a sequence is longer than a row.
    """
    num_rows = sum(map(_num_rows, picks))
    builder = _Builder(num_rows, length, pad)
    pairs = []
    for group, (pool, of_pool) in enumerate(zip(pools, picks, strict=True)):
        pairs += builder.add_pool(group, pool, of_pool)
    groups, chosen, versions = zip(*builder.segments, strict=True)
    return TrainRows(
        tokens=torch.from_numpy(builder.tokens),
        labels=torch.from_numpy(builder.labels),
        position_ids=torch.arange(length).expand(num_rows, length).contiguous(),
        segment_ids=torch.from_numpy(builder.segment_ids),
        roles=torch.tensor([ROLES.index(pick.role) for pick in chosen]),
        advantages=torch.tensor([pick.advantage for pick in chosen], dtype=torch.float32),
        weights=torch.tensor([pick.weight for pick in chosen], dtype=torch.float32),
        group_ids=torch.tensor(groups),
        policy_versions=torch.tensor(versions),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        rollout_logprobs=torch.from_numpy(builder.rollout_logprobs),
        reference_logprobs=torch.zeros(num_rows, length),
    )


def same_number_of_rows(picks: Sequence[Sequence[Pick]]) -> list[tuple[Pick, ...]]:
    """Picks filled up by dead ones, so that every pool makes as many rows as the largest does.

    A pipeline's stages exchange tensors of one shape; pools differ in their number of samples.
    """
    most = max(map(_num_rows, picks), default=0)
    filler = Pick(ORIGINAL_SUFFIX, "sample", 0.0, 0.0)
    return [(*of_pool, *[filler] * (most - _num_rows(of_pool))) for of_pool in picks]


def _num_rows(picks: Sequence[Pick]) -> int:
    return sum(pick.candidate != PREFIX for pick in picks)


def make_micro_batches(
    pools: Sequence[CandidatePool],
    picks: Sequence[Sequence[Pick]],
    *,
    micro_batch_size: int,
    length: int,
    pad: int,
) -> list[TrainRows]:
    """Rows of all pools of this rank, `micro_batch_size` pools at a time, as many rows each."""
    picks = same_number_of_rows(picks)
    return [
        make_rows(
            pools[i : i + micro_batch_size], picks[i : i + micro_batch_size], length=length, pad=pad
        )
        for i in range(0, len(pools), micro_batch_size)
    ]
