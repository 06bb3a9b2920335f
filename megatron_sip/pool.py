"""Assemble candidate pools, rank them by reward, and say what chance alone would choose. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_sip.config_judge import Guards
from megatron_sip.judge.guards import guard
from megatron_sip.types import Candidate, CandidatePool, PoolRewards, SipSample, Source


def chance_of_rollout(sources: Sequence[Source]) -> float:
    """Probability that a uniform pick from one pool is a policy rollout.

    Args:    sources: length C, one of "suffix", "rewrite", "rollout".
    Returns: fraction in [0, 1], no unit; log it beside the rollout-chosen rate.
    Raises:  ValueError if the pool is empty.
    """
    if not sources:
        raise ValueError("a pool without candidates has no chance rate")
    return sum(source == "rollout" for source in sources) / len(sources)


def suffix_candidate(sample: SipSample, text: str) -> Candidate:
    """The original suffix as a member of the pool."""
    return Candidate("suffix", sample.suffix_ids, text, np.zeros(0, np.float32), -1, "data")


def assemble_pool(
    sample: SipSample,
    prefix_text: str,
    suffix_text: str,
    candidates: Sequence[Candidate],
    *,
    min_tokens: int,
    guards: Guards,
) -> CandidatePool:
    """Join one prefix's candidates; those that a guard stops leave before a question is paid.

    Where none is left the original suffix is the pool, so that there is a row to train on.

    Args:   suffix_text: text of the original suffix.
            min_tokens: fewest tokens of a candidate (method 12: N / 8).
    """
    marked = [
        replace(
            c,
            guard=""
            if c.source == "suffix"  # what it is, the document is
            else guard(
                c.text, len(c.token_ids), prefix_text, min_tokens=min_tokens, settings=guards
            ),
        )
        for c in candidates
    ]
    kept = tuple(c for c in marked if not c.guard)
    kept = kept or (suffix_candidate(sample, suffix_text),)
    chance = chance_of_rollout([c.source for c in kept])
    return CandidatePool(sample, prefix_text, kept, chance, tuple(c for c in marked if c.guard))


def rank(rewards: PoolRewards, *, seed: int, sample_id: int) -> list[int]:
    """Valid candidates by rising total reward; ties in an order drawn from (seed, sample).

    Those that a gate stops come before all that pass. Never by position in the pool, which would
    favour one source (method 12).
    """
    draws = _draws(len(rewards.valid), seed, sample_id)
    order = np.lexsort((draws, rewards.total, rewards.passes))
    return [int(i) for i in order if rewards.valid[i]]


def drawn_order(num_candidates: int, *, seed: int, sample_id: int) -> list[int]:
    """All candidates of a pool that nobody judged, in an order drawn from (seed, sample)."""
    return [int(i) for i in np.argsort(_draws(num_candidates, seed, sample_id))]


def _draws(number: int, seed: int, sample_id: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, sample_id])).random(number)


def rollout_wins(pool: CandidatePool, rewards: PoolRewards) -> tuple[float, int]:
    """Wins of valid rollouts over the pool's suffix by gates, then total reward; ties half.

    Returns: (sum of wins, comparisons); (0, 0) where the pool has no valid suffix.
    """
    totals = [
        (pool.candidates[i].source, (bool(rewards.passes[i]), float(rewards.total[i])))
        for i in np.flatnonzero(rewards.valid)
    ]
    suffix = [total for source, total in totals if source == "suffix"]
    rollouts = [total for source, total in totals if source == "rollout"]
    if not suffix:
        return 0.0, 0
    wins = sum(1.0 if r > suffix[0] else 0.5 if r == suffix[0] else 0.0 for r in rollouts)
    return wins, len(rollouts)
