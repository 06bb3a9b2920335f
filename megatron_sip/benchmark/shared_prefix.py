"""Benchmark `shared-prefix`: the update on rows that share a prefix against padded rows.

Both layouts train the same pools through the same model, schedule and loss (a weighted sum of the
candidates' log-probs, so that every candidate gets a gradient); what is timed is forward and
backward. The ceiling is the ratio of positions that must be computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from megatron_sip.benchmark.single_rank import single_rank
from megatron_sip.config import Model, Optimizer
from megatron_sip.forward import forward_backward
from megatron_sip.model import (
    Policy,
    build_module,
    initialize_randomly,
    transformer_config,
    wrap_data_parallel,
)
from megatron_sip.objectives.terms import segment_sums
from megatron_sip.rows import make_micro_batches, row_length
from megatron_sip.types import Candidate, CandidatePool, Pick, RowLayout, SipSample, TrainRows

VOCAB = 4096
MODEL = Model(
    num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4,
    max_sequence_length=2048,
)  # fmt: skip
LAYOUTS: tuple[RowLayout, RowLayout] = ("padded", "shared_prefix")


@dataclass(frozen=True)
class Setting:
    """One pool: prefix of P tokens, K candidates of R."""

    name: str
    prefix: int
    suffix: int
    candidates: int
    repetitions: int

    @property
    def ceiling(self) -> float:
        """K (P + R) / (P + K R)."""
        p, r, k = self.prefix, self.suffix, self.candidates
        return k * (p + r) / (p + k * r)


SETTINGS = (
    Setting("grpo_k16", 480, 32, 16, 5),
    Setting("dpo_pair", 480, 32, 2, 5),
    Setting("grpo_k16_long", 1920, 128, 16, 3),
    Setting("dpo_pair_long", 1920, 128, 2, 3),
)


def shared_prefix(settings: Sequence[Setting] = SETTINGS) -> dict[str, Any]:
    """Ratio of seconds, padded over shared, for each setting (median of the repetitions)."""
    platform, parallel = single_rank()
    config = transformer_config(MODEL, parallel, platform)
    module = build_module(config, MODEL, platform, vocab_size=VOCAB)
    initialize_randomly(module, MODEL, seed=1)
    policy = wrap_data_parallel(config, module, Optimizer(lr=1e-3), platform)
    results = {s.name: compare(s, policy) for s in settings}
    return {
        "name": "shared-prefix",
        "settings": {
            "model": MODEL.model_dump(exclude={"init"}),
            "vocabulary": VOCAB,
            "threads": 1,
        },
        "results": results,
        "ratios": {name: found["ratio"] for name, found in results.items()},
    }


def compare(setting: Setting, policy: Policy) -> dict[str, float]:
    """Both layouts in turn, so that a change of the machine's speed meets both."""
    batches = {layout: rows_of(setting, layout) for layout in LAYOUTS}
    gradients = {layout: update(batches[layout], policy)[1] for layout in LAYOUTS}  # warm-up
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(setting.repetitions):
        for layout in LAYOUTS:
            seconds[layout].append(update(batches[layout], policy)[0])
    padded, shared = (gradients[layout] for layout in LAYOUTS)
    return {
        "padded_s": median(seconds["padded"]),
        "shared_s": median(seconds["shared_prefix"]),
        "ratio": median(
            a / b for a, b in zip(seconds["padded"], seconds["shared_prefix"], strict=True)
        ),
        "ceiling": setting.ceiling,
        "gradient_difference": ((padded - shared).norm() / padded.norm()).item(),
    }


def rows_of(setting: Setting, layout: RowLayout) -> list[TrainRows]:
    """One micro-batch with one pool of random tokens, the same for both layouts."""
    rng = np.random.default_rng(7)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    sample = SipSample(0, 0, setting.prefix, ids(setting.prefix), ids(setting.suffix))
    none = np.zeros(0, np.float32)
    candidates = tuple(
        Candidate("rollout", ids(setting.suffix), "", none, -1, "length")
        for _ in range(setting.candidates)
    )
    weights = rng.normal(size=setting.candidates)
    picks = [Pick(i, "target", 0.0, float(w)) for i, w in enumerate(weights)]
    return make_micro_batches(
        [CandidatePool(sample, "", candidates, 1.0)],
        [picks],
        micro_batch_size=1,
        layout=layout,
        length=row_length(setting.prefix, setting.suffix, 1),
        multiple=1,
        pad=0,
    )


def update(batches: list[TrainRows], policy: Policy) -> tuple[float, torch.Tensor]:
    """Seconds of forward and backward, and all gradients as one vector."""
    policy.ddp.zero_grad_buffer()
    begun = time.perf_counter()
    forward_backward(policy.ddp, batches, weighted_logprobs)
    seconds = time.perf_counter() - begun
    return seconds, torch.cat([b.grad_data.clone() for b in policy.ddp.buffers])


def weighted_logprobs(
    logprobs_RS: torch.Tensor, entropy_RS: torch.Tensor, rows: TrainRows
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    loss = (rows.weights * segment_sums(logprobs_RS, rows)).sum()
    return loss, torch.ones((), dtype=torch.int32), {}
