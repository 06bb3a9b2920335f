"""Pools, rewards and rows for the tests of the pure files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sip.types import Candidate, CandidatePool, PoolRewards, SipSample, Source


def sample(sample_id: int = 7, prefix: Sequence[int] = (1, 2, 3), suffix: Sequence[int] = (4, 5)):
    return SipSample(sample_id, 0, len(prefix), np.int32(prefix), np.int32(suffix))


def candidate(
    ids: Sequence[int], source: Source = "rollout", *, version: int = 3, text: str = "text"
) -> Candidate:
    """A candidate whose engine log-probs are -0.1, -0.2, ... where it is a rollout."""
    made = -0.1 * np.arange(1, len(ids) + 1, dtype=np.float32)
    rollout = source == "rollout"
    return Candidate(
        source, np.int32(ids), text, made if rollout else made[:0], version if rollout else -1,
        "length" if rollout else "data",
    )  # fmt: skip


def pool(of: SipSample, *candidates: Candidate) -> CandidatePool:
    return CandidatePool(of, "prefix", candidates, 0.5)


def rewards(
    totals: Sequence[float],
    valid: Sequence[bool] | None = None,
    passes: Sequence[bool] | None = None,
) -> PoolRewards:
    """NaN is invalid."""
    total = np.float32(totals)
    known = ~np.isnan(total) if valid is None else np.array(valid)
    return PoolRewards({}, total, known, 0, known if passes is None else np.array(passes))
