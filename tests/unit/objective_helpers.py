"""Pools, rows and log-probs that the tests of the objectives share, and the documented example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pool_helpers import candidate, pool, rewards, sample

from megatron_sip.objectives import OBJECTIVES, picks_of
from megatron_sip.objectives.terms import total_loss
from megatron_sip.rows import make_rows
from megatron_sip.types import CandidatePool, PoolRewards, TrainRows

NAN = float("nan")
By_Tokens = Mapping[tuple[int, ...], Sequence[float]]


def some_pools() -> tuple[list[CandidatePool], list[PoolRewards]]:
    """Live, none valid, one valid, all equal, live."""
    pools = [
        pool(
            sample(i, range(1, 4 + i % 2), (20, 21, 22)),
            candidate((20, 21, 22), "suffix"),
            candidate((30 + i,), "rewrite"),
            candidate((40, 41)),
            candidate((50, 51, 52, 53)),
        )
        for i in range(5)
    ]
    totals = [[0, 1, 2, -1], [NAN] * 4, [NAN, NAN, 1, NAN], [1.0] * 4, [3, 1, NAN, 2]]
    return pools, [rewards(t) for t in totals]


def picks_for(pools: list[CandidatePool], found: list[PoolRewards], settings: Any) -> list[Any]:
    return picks_of(pools, found, settings, seed=3)


def rows_of(settings: Any, pools: list[CandidatePool], found: list[PoolRewards]) -> TrainRows:
    """Rows with weights, advantages and drawn reference and engine log-probs in float64."""
    rows = make_rows(pools, picks_for(pools, found, settings), length=9, pad=0)
    generator = torch.Generator().manual_seed(2)

    def drawn() -> torch.Tensor:
        return -3 * torch.rand(rows.tokens.shape, generator=generator, dtype=torch.float64)

    return replace(
        rows, reference_logprobs=drawn(), rollout_logprobs=drawn(), weights=rows.weights.double(),
        advantages=rows.advantages.double(),
    )  # fmt: skip


def some_rows(settings: Any) -> TrainRows:
    return rows_of(settings, *some_pools())


def some_logprobs(rows: TrainRows) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return -3 * torch.rand(rows.tokens.shape, generator=generator, dtype=torch.float64)


def terms_of(logprobs: torch.Tensor, rows: TrainRows, settings: Any) -> tuple[Any, ...]:
    return OBJECTIVES[settings.name][1](logprobs, rows, settings)


def loss_of(logprobs: torch.Tensor, rows: TrainRows, settings: Any) -> torch.Tensor:
    terms = terms_of(logprobs, rows, settings)
    return total_loss(terms, {t.name: float(t.count) for t in terms})


def metrics_of(terms: Sequence[Any]) -> dict[str, float]:
    """Means of a step's terms by metric."""
    pairs = {name: pair for term in terms for name, pair in term.metrics.items()}
    return {name: float(pair[0] / pair[1]) for name, pair in pairs.items() if pair[1]}


def tokens_of(logprobs: torch.Tensor, row: int, prefix: int, length: int) -> torch.Tensor:
    """Log-probs of a continuation of `length` tokens after `prefix` tokens."""
    return logprobs[row, prefix - 1 : prefix - 1 + length]


def live_labels(rows: TrainRows) -> torch.Tensor:
    """bool[R, S]: labels of segments of weight > 0."""
    return torch.cat([rows.weights > 0, torch.tensor([False])])[rows.segment_ids.long()]


# docs/objectives.md: the prefix "1 2" with two candidates, A and B
A, B = (3, 4), (5,)
POLICY = {A: (-1.0, -2.0), B: (-4.0,)}
REFERENCE = {A: (-1.5, -2.5), B: (-3.5,)}
ENGINE = {A: (-1.0 - np.log(1.5), -2.0), B: (-4.0 - np.log(0.5),)}  # ratios 1.5, 1 and 0.5
REWARDS = [2.0, 1.0]  # of A, of B


def placed(values: By_Tokens, rows: TrainRows) -> torch.Tensor:
    """float64[R, S]: each segment's labels looked up in `values`; -9 elsewhere."""
    out = torch.full(rows.tokens.shape, -9.0, dtype=torch.float64)
    for m in range(len(rows.weights)):
        where = rows.segment_ids == m
        out[where] = torch.tensor(values[tuple(rows.labels[where].tolist())], dtype=torch.float64)
    return out


def example(settings: Any) -> tuple[torch.Tensor, TrainRows]:
    """Log-probs and rows of the documented example: A is suffix and rollout, B the rewrite too."""
    rewritten = settings.name in ("sft_rewrite", "dpo_rewrite")
    other = candidate(B, "rewrite" if rewritten else "rollout")
    one = pool(sample(1, (1, 2), A), candidate(A), other)
    picks = picks_for([one], [rewards(REWARDS)], settings)
    rows = make_rows([one], picks, length=4, pad=0)
    rows = replace(
        rows, reference_logprobs=placed(REFERENCE, rows), rollout_logprobs=placed(ENGINE, rows),
        weights=rows.weights.double(), advantages=rows.advantages.double(),
    )  # fmt: skip
    return placed(POLICY, rows), rows
