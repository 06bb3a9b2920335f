"""Benchmark `shared-prefix`: the update on rows that share a prefix against padded rows.

Both layouts train the same pools through the same model, schedule and loss (a weighted sum of the
candidates' log-probs, so that every candidate gets a gradient); what is timed is forward and
backward. The ceiling is the ratio of positions that must be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from megatron_sip.benchmark.measure import interleaved_seconds, one_rank
from megatron_sip.config import Model, Optimizer, Parallel
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


def run(settings: Sequence[Setting] = SETTINGS) -> dict[str, Any]:
    """Ratios padded / shared of seconds, by setting: medians of the repetitions."""
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with one_rank() as platform:
        config = transformer_config(MODEL, Parallel(world_size=1), platform)
        module = build_module(config, MODEL, platform, vocab_size=VOCAB)
        initialize_randomly(module, MODEL, seed=1)
        policy = wrap_data_parallel(config, module, Optimizer(lr=1e-3), platform)
        for setting in settings:
            found = compare(setting, policy)
            results |= {f"{setting.name}_{key}": value for key, value in found.items()}
            ratios[setting.name] = found["ratio"]
    described = {"model": MODEL.model_dump(mode="json"), "vocabulary": VOCAB}
    return {"name": "shared-prefix", "settings": described, "results": results, "ratios": ratios}


def compare(setting: Setting, policy: Policy) -> dict[str, Any]:
    """Seconds of both layouts in turn, and how far apart their gradients are."""
    batches = {layout: rows_of(setting, layout) for layout in LAYOUTS}
    tasks = {layout: partial(update, batches[layout], policy) for layout in LAYOUTS}
    seconds = interleaved_seconds(tasks, repetitions=setting.repetitions)
    padded, shared = (update(batches[layout], policy) for layout in LAYOUTS)
    pairs = zip(*(seconds[layout] for layout in LAYOUTS), strict=True)
    return {
        **{f"{layout}_s": taken for layout, taken in seconds.items()},
        "ratio": median(a / b for a, b in pairs),
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


def update(batches: list[TrainRows], policy: Policy) -> torch.Tensor:
    """Forward and backward; all gradients as one vector."""
    policy.ddp.zero_grad_buffer()
    forward_backward(policy.ddp, batches, weighted_logprobs)
    return torch.cat([b.grad_data.clone() for b in policy.grad_buffers])


def weighted_logprobs(
    logprobs_RS: torch.Tensor, entropy_RS: torch.Tensor, rows: TrainRows
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    loss = (rows.weights * segment_sums(logprobs_RS, rows)).sum()
    return loss, torch.ones((), dtype=torch.int32), {}
