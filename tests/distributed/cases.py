"""What the distributed tests train on: a tiny model, uneven pools (some dead), each objective.

`plain_loss` is the loss of a case from the formulas alone: no rows, segments, masks, micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plain_llama
import torch

from megatron_sip.config_model import Experts, Model, RopeScaling
from megatron_sip.config_objective import (
    DpoObjective,
    DpoRewriteObjective,
    GrpoObjective,
    NllObjective,
    Objective,
    RfNllObjective,
    SftRewriteObjective,
    SimpoObjective,
)
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
    engine_reference: bool = False
    recompute: bool = False
    changed: tuple[tuple[str, Any], ...] = ()  # of the model

    @property
    def model(self) -> Model:
        changed = dict(self.changed)
        if self.recompute:
            changed["recompute_granularity"] = "full"
        return tiny_model(tied=self.tied).model_copy(update=changed)


def _cases() -> list[Case]:
    dpo = DpoObjective(name="dpo", beta=0.3, suffix_weight=0.5, prefix_weight=0.25)
    plain_dpo = DpoObjective(name="dpo", beta=0.2, pairs_per_pool=2)
    nll = NllObjective(name="nll", prefix_weight=0.4)
    best = RfNllObjective(name="rf_nll")
    best_and_prefix = RfNllObjective(name="rf_nll", prefix_weight=0.4)
    engine = DpoObjective(name="dpo", beta=0.2, pair_sources=("rollout",))
    mean = DpoObjective(name="dpo", beta=2.0, logprobs="mean", chosen_weight=0.5)
    rewrite = DpoRewriteObjective(name="dpo_rewrite", beta=0.2, pairs_per_pool=4)  # all rollouts
    grpo = GrpoObjective(name="grpo", kl_weight=0.05, suffix_weight=0.5, prefix_weight=0.25)
    dr_grpo = GrpoObjective(name="grpo", advantage="centered", token_divisor=SUFFIX)
    return [
        Case("sft_rewrite", SftRewriteObjective(name="sft_rewrite", prefix_weight=0.4), False, 2),
        Case("dpo_mean", mean, False, 2, True),
        Case("dpo_engine", engine, False, 2, True, engine_reference=True),
        Case("dpo_rewrite", rewrite, True, 2),
        Case("simpo", SimpoObjective(name="simpo", suffix_weight=0.5), False, 2, True),
        Case("grpo", grpo, False, 2, True),
        Case("grpo_tied", dr_grpo, True, 4, True),
        Case("nll", nll, False, 2),
        Case("nll_tied", nll, True, 1),
        Case("rf_nll", best, False, 4),
        Case("rf_nll_tied", best_and_prefix, True, 2),
        Case("dpo", dpo, False, 1, True),
        Case("dpo_mbs2", dpo, False, 2, True),
        Case("dpo_mbs4", dpo, False, 4, True),
        Case("dpo_tied", dpo, True, 2, True),
        Case("dpo_two_pairs", plain_dpo, False, 2, True),
        Case("dpo_recompute", dpo, False, 2, True, recompute=True),
    ]


CASES = {case.name: case for case in _cases()} | {
    f"{case.name}_shared": replace(
        case,
        name=f"{case.name}_shared",
        objective=case.objective.model_copy(update={"row_layout": "shared_prefix"}),
    )
    for case in _cases()
}


def _families() -> list[Case]:
    """What families add to the model, with a vocabulary that is half padding on the last rank."""
    dpo = DpoObjective(
        name="dpo", beta=0.3, suffix_weight=0.5, prefix_weight=0.25, row_layout="shared_prefix"
    )
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=16)
    four = Experts(num_experts=4, experts_per_token=2)
    models: dict[str, dict[str, Any]] = {
        "llama3": {"rope_scaling": scaling, "kv_channels": 10},
        "qwen2": {"family": "qwen2"},
        "qwen3": {"family": "qwen3", "kv_channels": 12},
        "mixtral": {"family": "mixtral", "experts": four},
        "qwen3_moe": {
            "family": "qwen3_moe", "experts": four.model_copy(update={"normalize": False})
        },
    }  # fmt: skip
    padded = ("make_vocab_size_divisible_by", 96)
    return [
        Case(name, dpo, name in ("qwen2", "qwen3_moe"), 2, True, changed=(*m.items(), padded))
        for name, m in models.items()
    ]


FAMILIES = {case.name: case for case in _families()}


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
            made = (rng.normal(size=len(tokens)) - 4).astype(np.float32)
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
        rewards.append(PoolRewards({}, total, valid, 0, valid))
    return pools, rewards


class _Scorer:
    """Log-probs of parts of [prefix, continuation] under given weights."""

    def __init__(self, weights: dict[str, torch.Tensor], case: Case) -> None:
        self.weights, self.model = weights, case.model.model_dump()

    def __call__(self, prefix: np.ndarray, of: Candidate) -> torch.Tensor:
        """Of each token of a continuation."""
        ids = torch.from_numpy(np.concatenate([prefix, of.token_ids])).long()
        return plain_llama.logprobs(self.weights, self.model, ids)[len(prefix) - 1 :]

    def prefix(self, prefix: np.ndarray) -> torch.Tensor:
        return plain_llama.logprobs(self.weights, self.model, torch.from_numpy(prefix).long()).sum()


class _Engine:
    """The log-probs that came with a rollout."""

    def __call__(self, prefix: np.ndarray, of: Candidate) -> torch.Tensor:
        return torch.from_numpy(of.logprobs).double()


Member = tuple[np.ndarray, Candidate]  # prefix, continuation


def _members(case: Case) -> tuple[dict[str, list[Member]], list[tuple[Member, Member]]]:
    """What is trained on by plain NLL, by kind, and the pairs of chosen and rejected."""
    settings = case.objective
    single: dict[str, list[Member]] = {"suffix": [], "best": [], "rewrite": []}
    pairs: list[tuple[Member, Member]] = []
    for pool, reward in zip(*pools_of(case), strict=True):
        members = [(pool.sample.prefix_ids, c) for c in pool.candidates]
        single["suffix"].append(members[0])
        single["rewrite"].append(members[1])
        ranked = sorted(np.flatnonzero(reward.valid), key=lambda i: reward.total[i])
        if ranked:
            single["best"].append(members[ranked[-1]])
        if settings.name == "dpo_rewrite":
            pairs += [(members[1], rollout) for rollout in members[2:]]
            continue
        sources = getattr(settings, "pair_sources", ())
        ranked = [i for i in ranked if pool.candidates[i].source in sources]
        for q in range(getattr(settings, "pairs_per_pool", 0)):
            if q < len(ranked) // 2 and reward.total[ranked[-1 - q]] > reward.total[ranked[q]]:
                pairs.append((members[ranked[-1 - q]], members[ranked[q]]))
    return single, pairs


def _pair_loss(settings: Objective, pi: _Scorer, ref: Any, pairs: Any) -> torch.Tensor:
    """-mean log sigmoid(beta (s+ - s-) - gamma)."""

    def score(member: Member) -> torch.Tensor:
        if settings.name == "simpo":
            return pi(*member).mean()
        gaps = pi(*member) - ref(*member)
        return gaps.sum() if settings.logprobs == "sum" else gaps.mean()

    gamma = settings.gamma if settings.name == "simpo" else 0.0
    return -sum(
        torch.log(torch.sigmoid(settings.beta * (score(chosen) - score(rejected)) - gamma))
        for chosen, rejected in pairs
    ) / len(pairs)


def _grpo_loss(settings: GrpoObjective, case: Case, pi: _Scorer, ref: Any) -> torch.Tensor:
    """Token by token, as in the paper."""
    loss, live, c = torch.zeros((), dtype=torch.float64), 0, settings.clip
    for pool, reward in zip(*pools_of(case), strict=True):
        group = [i for i, x in enumerate(pool.candidates) if x.source == "rollout"]
        group = [i for i in group if reward.valid[i]]
        found = reward.total[group].astype(np.float64)
        if len(found) < 2 or len(set(found)) == 1:
            continue
        for i, r in zip(group, found, strict=True):
            a = float(r - found.mean())
            if settings.advantage == "standardized":
                a /= float(found.std()) + 1e-6
            one = pool.candidates[i]
            now, then = pi(pool.sample.prefix_ids, one), ref(pool.sample.prefix_ids, one)
            live += 1
            for t, made in enumerate(one.logprobs):
                rho = torch.exp(now[t] - float(made))
                gain = min(rho * a, torch.clamp(rho, 1 - c, 1 + c) * a)
                d = then[t] - now[t]
                kl = torch.exp(d) - d - 1
                n = settings.token_divisor or len(one.logprobs)
                loss = loss + (settings.kl_weight * kl - gain) / n
    return loss / live


def plain_loss(
    case: Case, policy: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Loss of the step over all pools."""
    settings = case.objective
    pi = _Scorer(policy, case)
    ref = _Engine() if case.engine_reference else _Scorer(reference or policy, case)
    single, pairs = _members(case)

    def nll(members: list[Member]) -> torch.Tensor:
        return -sum(pi(*m).sum() for m in members) / sum(len(y.token_ids) for _, y in members)

    kinds = {"nll": "suffix", "rf_nll": "best", "sft_rewrite": "rewrite"}
    if settings.name in kinds:
        loss = nll(single[kinds[settings.name]])
    elif isinstance(settings, GrpoObjective):
        loss = _grpo_loss(settings, case, pi, ref)
    else:
        loss = _pair_loss(settings, pi, ref, pairs)
    if getattr(settings, "suffix_weight", 0.0):
        loss = loss + settings.suffix_weight * nll(single["suffix"])
    if getattr(settings, "chosen_weight", 0.0):
        loss = loss + settings.chosen_weight * nll([chosen for chosen, _ in pairs])
    if settings.prefix_weight:
        prefixes = [p for p, _ in single["suffix"]]
        total = -sum(pi.prefix(p) for p in prefixes)
        loss = loss + settings.prefix_weight * total / sum(len(p) - 1 for p in prefixes)
    return loss
