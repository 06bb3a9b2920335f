"""What the distributed tests train on: a tiny model, uneven pools (some dead), each objective.

`plain_loss` is the loss of a case from the formulas alone: no rows, segments, masks, micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import plain_llama
import torch

from megatron_sip.config import Model
from megatron_sip.config_objective import DpoObjective, NllObjective, Objective, RfNllObjective
from megatron_sip.types import Candidate, CandidatePool, PoolRewards, SipSample

VOCAB = 128
LONGEST_PREFIX, SUFFIX = 14, 10
NUM_POOLS = 8
NONE_VALID, ONE_VALID, ALL_EQUAL = 2, 5, 6  # pools without contrast


def tiny_model(*, tied: bool) -> Model:
    return Model(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        max_sequence_length=32,
        init_std=0.2,  # large, so that attention and gates are far from uniform
        rotary_base=500,
        norm_epsilon=1e-3,
        share_embeddings_and_output_weights=tied,
    )


@dataclass(frozen=True)
class Case:
    """One optimizer step."""

    name: str
    objective: Objective
    tied: bool
    micro_batch_size: int
    equal_pool: bool = False  # is ALL_EQUAL really equal? (a tie would leave the choice to chance)
    none_live: bool = False

    @property
    def model(self) -> Model:
        return tiny_model(tied=self.tied)


def _cases() -> list[Case]:
    dpo = DpoObjective(name="dpo", beta=0.3, suffix_weight=0.5, prefix_weight=0.25)
    plain_dpo = DpoObjective(name="dpo", beta=0.2, pairs_per_pool=2)
    nll = NllObjective(name="nll", prefix_weight=0.4)
    best = RfNllObjective(name="rf_nll")
    best_and_prefix = RfNllObjective(name="rf_nll", prefix_weight=0.4)
    return [
        Case("nll", nll, False, 2),
        Case("nll_tied", nll, True, 1),
        Case("rf_nll", best, False, 4),
        Case("rf_nll_tied", best_and_prefix, True, 2),
        Case("dpo", dpo, False, 1, True),
        Case("dpo_mbs2", dpo, False, 2, True),
        Case("dpo_mbs4", dpo, False, 4, True),
        Case("dpo_tied", dpo, True, 2, True),
        Case("dpo_two_pairs", plain_dpo, False, 2, True),
    ]


CASES = {case.name: case for case in _cases()} | {
    f"{case.name}_shared": replace(
        case,
        name=f"{case.name}_shared",
        objective=case.objective.model_copy(update={"row_layout": "shared_prefix"}),
    )
    for case in _cases()
}


def pools_of(case: Case) -> tuple[list[CandidatePool], list[PoolRewards]]:
    """Pools of 4 to 6 candidates of 2 to 10 tokens after prefixes of 5 to 14."""
    rng = np.random.default_rng(5)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(low, high + 1)).astype(np.int32)

    pools, rewards = [], []
    for b in range(NUM_POOLS):
        sample = SipSample(100 + b, b, 0, ids(5, LONGEST_PREFIX), ids(SUFFIX, SUFFIX))
        none = np.zeros(0, np.float32)
        candidates = [
            Candidate("suffix", sample.suffix_ids, "s", none, -1, "data"),
            Candidate("rewrite", ids(4, SUFFIX), "r", none, -1, "stop"),
        ]
        for _ in range(int(rng.integers(2, 5))):
            tokens = ids(2, SUFFIX)
            # of an older policy, so that no mismatch with the engine is measured
            made = rng.normal(size=len(tokens)).astype(np.float32)
            candidates.append(Candidate("rollout", tokens, "o", made, -5, "length"))
        count = len(candidates)
        total = rng.permutation(count).astype(np.float32) / 4
        valid = rng.random(count) < 0.85
        valid[:2] = True
        if b == NONE_VALID or case.none_live:
            valid[:] = False
        if b == ONE_VALID:
            valid[:] = np.arange(count) == 1
        if b == ALL_EQUAL and case.equal_pool:
            total[:] = 0.5
        total = np.where(valid, total, np.nan).astype(np.float32)
        pools.append(CandidatePool(sample, "p", tuple(candidates), 0.5))
        rewards.append(PoolRewards({}, total, valid, 0))
    return pools, rewards


class _Scorer:
    """Sums of log-probs of parts of [prefix, continuation] under given weights."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        self.weights, self.model = weights, case.model.model_dump()

    def __call__(self, prefix: np.ndarray, continuation: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.concatenate([prefix, continuation])).long()
        found = plain_llama.logprobs(self.weights, self.model, ids)
        return found[len(prefix) - 1 :].sum()

    def prefix(self, prefix: np.ndarray) -> torch.Tensor:
        return plain_llama.logprobs(self.weights, self.model, torch.from_numpy(prefix).long()).sum()


def plain_loss(
    case: Case, policy: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Loss of the step over all pools."""
    settings = case.objective
    pi, ref = _Scorer(policy, case), _Scorer(reference, case)
    prefixes, suffixes, best, pairs = [], [], [], []
    for pool, reward in zip(*pools_of(case), strict=True):
        prefix = pool.sample.prefix_ids
        prefixes.append(prefix)
        suffixes.append((prefix, pool.sample.suffix_ids))
        ranked = sorted(np.flatnonzero(reward.valid), key=lambda i: reward.total[i])
        tokens = [c.token_ids for c in pool.candidates]
        if ranked:
            best.append((prefix, tokens[ranked[-1]]))
        for q in range(getattr(settings, "pairs_per_pool", 0)):
            if q < len(ranked) // 2 and reward.total[ranked[-1 - q]] > reward.total[ranked[q]]:
                pairs.append((prefix, tokens[ranked[-1 - q]], tokens[ranked[q]]))

    def nll(members: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
        return -sum(pi(p, y) for p, y in members) / sum(len(y) for _, y in members)

    loss = torch.zeros((), dtype=torch.float64)
    if settings.name == "nll":
        loss = loss + nll(suffixes)
    elif settings.name == "rf_nll":
        loss = loss + nll(best)
    else:
        for p, chosen, rejected in pairs:
            h = (pi(p, chosen) - ref(p, chosen)) - (pi(p, rejected) - ref(p, rejected))
            loss = loss - torch.log(torch.sigmoid(settings.beta * h)) / len(pairs)
        if settings.suffix_weight:
            loss = loss + settings.suffix_weight * nll(suffixes)
    if settings.prefix_weight:
        total = -sum(pi.prefix(p) for p in prefixes)
        loss = loss + settings.prefix_weight * total / sum(len(p) - 1 for p in prefixes)
    return loss
