"""Pairs of chosen and rejected: who they are, and the loss on the difference of their scores.

Every objective on pairs is L = mean over live pairs of l(s+ - s-), with s the score of a segment;
`dpo.py` and `simpo.py` say what s and l are. Legend: M segments, Q pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_sip.config_objective import DpoObjective, PairObjective, SimpoObjective
from megatron_sip.objectives.terms import side_picks
from megatron_sip.types import CandidatePool, LossTerm, Pick, PoolRewards, TrainRows


def pair_picks(
    pairs: Sequence[tuple[int, int, bool]], settings: PairObjective, num_pairs: int
) -> tuple[Pick, ...]:
    """The pairs of one pool, filled up to `num_pairs` by dead ones, and what stands beside.

    Args:    pairs: (chosen, rejected, is it live), at most `num_pairs`.
    Returns: chosen, rejected, chosen, rejected, ...; what fills up is candidate 0 twice at weight
             0, so that ranks keep step.
    """
    picks: list[Pick] = []
    for chosen, rejected, live in (*pairs, *[(0, 0, False)] * (num_pairs - len(pairs))):
        picks += [
            Pick(chosen, "chosen", 0.0, float(live)),
            Pick(rejected, "rejected", 0.0, float(live)),
        ]
    return (*picks, *side_picks(settings))


def select_best_and_worst(
    pools: Sequence[CandidatePool],
    rewards: Sequence[PoolRewards],
    settings: DpoObjective | SimpoObjective,
    order: Sequence[Sequence[int]],
) -> list[tuple[Pick, ...]]:
    """Best with worst, second best with second worst, ... among `pair_sources` (method 5.4).

    Args:    order: for each pool, its valid candidates by rising reward, ties broken by seed.
    Returns: for each pool the picks of `pairs_per_pool` pairs, dead ones (too few candidates,
             equal rewards, or none that passes the gates) with weight 0, then the suffix and the
             prefix if the recipe trains on them.
    """
    picks = []
    for pool, reward, ranked in zip(pools, rewards, order, strict=True):
        allowed = [i for i in ranked if pool.candidates[i].source in settings.pair_sources]
        number = min(settings.pairs_per_pool, len(allowed) // 2)
        pairs = [
            (allowed[-1 - q], low, _is_live(reward, allowed[-1 - q], low))
            for q, low in enumerate(allowed[:number])
        ]
        picks.append(pair_picks(pairs, settings, settings.pairs_per_pool))
    return picks


def _is_live(reward: PoolRewards, chosen: int, rejected: int) -> bool:
    """Whether one is better: it passes every gate, and the other does not or has less reward."""
    if not reward.passes[chosen]:
        return False
    return bool(not reward.passes[rejected] or reward.total[chosen] > reward.total[rejected])


def pair_term(
    name: str,
    scores_M: torch.Tensor,
    rows: TrainRows,
    *,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    score: str,
) -> LossTerm:
    """sum over live pairs of l(s+ - s-), and what the pairs say.

    Args:    scores_M: float[M], nats, s of each segment. loss_of: l, element-wise.
             score: what s is, in the names objective/chosen_SCORE and objective/rejected_SCORE.
    Returns: the term; its count in live pairs.
    """
    chosen_Q, rejected_Q = rows.pairs.unbind(1)
    live_Q = rows.weights[chosen_Q]
    margin_Q = scores_M[chosen_Q] - scores_M[rejected_Q]
    loss_Q = loss_of(margin_Q)

    def mean(values_Q: torch.Tensor) -> torch.Tensor:
        return torch.stack([(live_Q * values_Q.detach()).sum(), live_Q.sum()])

    metrics = {
        f"objective/{name}": mean(loss_Q),
        "objective/margin": mean(margin_Q),
        "objective/margin_accuracy": mean((margin_Q > 0).float()),
        f"objective/chosen_{score}": mean(scores_M[chosen_Q]),
        f"objective/rejected_{score}": mean(scores_M[rejected_Q]),
    }
    return LossTerm(name, (live_Q * loss_Q).sum(), (live_Q > 0).sum(), 1.0, metrics)
