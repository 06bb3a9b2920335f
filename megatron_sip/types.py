"""The data objects of one SIP step, in the order in which they are made. Fields and shapes only.

Legend: B prompts on this data-parallel rank, K rollouts, C candidates of one prompt, P prefix
length, N suffix limit, L candidate length (<= N), R rows, S padded row length, M scored segments,
Q pairs. Token ids are the policy tokenizer's; log-probabilities are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Source = Literal["suffix", "rewrite", "rollout"]
RowLayout = Literal["padded", "shared_prefix"]
Role = Literal["target", "chosen", "rejected", "prefix", "sample"]
ROLES: tuple[Role, ...] = ("target", "chosen", "rejected", "prefix", "sample")


@dataclass(frozen=True)
class SipSample:
    """One document cut into a prefix and the true continuation."""

    sample_id: int  # position in the run's endless sample order
    document_id: int
    cut: int  # index of the first suffix token in the document
    prefix_ids: np.ndarray  # int32[P]
    suffix_ids: np.ndarray  # int32[N]


@dataclass(frozen=True)
class Plan:
    """What the curriculum wants of the next step."""

    stage: str
    sources: tuple[Source, ...]
    num_rollouts: int
    objective: str


@dataclass(frozen=True)
class Candidate:
    """One continuation of a prefix."""

    source: Source
    token_ids: np.ndarray  # int32[L], end-of-text included if it was produced
    text: str  # decoded after the prefix, for the judge only
    logprobs: np.ndarray  # float32[L] from the engine, nats; empty unless a rollout
    policy_version: int  # weights that made it; -1 unless a rollout
    finish_reason: str  # "stop", "length"; "data" for the suffix
    guard: str = ""  # why no question about it is asked, such as "repetition"; "": none


@dataclass(frozen=True)
class CandidatePool:
    """All candidates of one prefix."""

    sample: SipSample
    prefix_text: str
    candidates: tuple[Candidate, ...]  # C
    chance_rollout: float  # probability that a uniform pick is a rollout
    guarded: tuple[Candidate, ...] = ()  # those that left before a question, their `guard` why


@dataclass(frozen=True)
class Question:
    """One thing to ask a judge about one pool."""

    criterion: str
    candidate: int  # index in the pool
    opponent: int  # index in the pool; -1: the criterion is not pairwise
    vote: int  # 0-based repetition
    candidate_first: bool  # order of presentation; True where there is no opponent


@dataclass(frozen=True)
class Verdict:
    """The answer to one question."""

    criterion: str
    candidate: int
    opponent: int
    vote: int
    score: float | None  # None: no usable verdict (never 0 in its place)
    reply: str  # what the judge said, or why there is no score
    candidate_first: bool = True  # order of presentation


@dataclass(frozen=True)
class PoolRewards:
    """Scores of one pool."""

    by_criterion: dict[str, np.ndarray]  # float32[C]; NaN where missing
    total: np.ndarray  # float32[C]; NaN where invalid
    valid: np.ndarray  # bool[C]
    num_missing: int
    passes: np.ndarray  # bool[C]: valid and through every gate; only these are ever preferred


@dataclass(frozen=True)
class Pick:
    """One segment of a pool that the objective trains on."""

    candidate: int  # index in the pool; -1: the prefix itself
    role: Role
    advantage: float
    weight: float  # 0: the pool is dead, the row stays so that ranks keep step


@dataclass(frozen=True)
class TrainRows:
    """Rows of tokens and the scored segments they hold.

    A segment is one candidate (or prefix) as the labels of some positions. A pair's two segments
    are named in `pairs`; the rows of one pool are adjacent and never parted by a micro-batch.
    """

    tokens: torch.Tensor  # int64[R, S]
    labels: torch.Tensor  # int64[R, S]
    position_ids: torch.Tensor  # int64[R, S]
    branch_ids: torch.Tensor  # int32[R, S]: 0 prefix, 1.. branch, -1 padding; [R, 0] in padded rows
    segment_ids: torch.Tensor  # int32[R, S]: m whose label stands here, -1 none
    roles: torch.Tensor  # int64[M], index into ROLES
    advantages: torch.Tensor  # float32[M]
    weights: torch.Tensor  # float32[M]
    group_ids: torch.Tensor  # int64[M], the pool (0..B-1 on this rank) a segment belongs to
    policy_versions: torch.Tensor  # int64[M], -1 unless a rollout
    pairs: torch.Tensor  # int64[Q, 2]: chosen m, rejected m
    rollout_logprobs: torch.Tensor  # float32[R, S], zeros where unknown
    reference_logprobs: torch.Tensor  # float32[R, S], zeros where unused


@dataclass(frozen=True)
class LossTerm:
    """One summand of the loss, before division by its own global count."""

    name: str
    sum: torch.Tensor  # float32[], with gradient
    count: torch.Tensor  # int64[]: what `sum` runs over (tokens, live pairs)
    weight: float
    metrics: dict[str, torch.Tensor]  # float32[2] each: [sum, count]


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint must know beside weights and optimizer."""

    step: int
    consumed_samples: int
    policy_version: int
    stats: dict[str, float]  # moving averages of the curriculum
    digests: dict[str, str]  # data and tokenizer
    reference_version: int = -1  # policy version that the reference was taken of, -1: none yet
    skipped_steps: int = 0  # whose update was left out for want of finite numbers
    skipped_in_a_row: int = 0  # of them, the last ones without a gap
    spent: dict[str, float] = field(default_factory=dict)  # on judges: questions, tokens, money
