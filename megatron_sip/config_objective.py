"""The recipe's [objective] and [reference]: what is learned from a pool, and compared with what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_sip.config_base import NonNegative, Positive, PositiveInt, Section
from megatron_sip.types import RowLayout, Source


class ObjectiveSection(Section):
    """What every objective has."""

    row_layout: RowLayout = "padded"
    """padded: a row for each candidate. shared_prefix: a row for each pool, which holds the prefix
    once and the candidates as branches; the same numbers for less work."""
    prefix_weight: NonNegative = 0.0
    """Weight of next-token prediction on the prefix as a further loss term."""


class NllObjective(ObjectiveSection):
    """-log pi(suffix | prefix), a scored token (method 5.1)."""

    name: Literal["nll"]


class SftRewriteObjective(ObjectiveSection):
    """-log pi(rewrite | prefix), a scored token; asks no judge (method 5.2)."""

    name: Literal["sft_rewrite"]


class RfNllObjective(ObjectiveSection):
    """-log pi(best candidate | prefix), a scored token (method 5.3)."""

    name: Literal["rf_nll"]


class PairObjective(ObjectiveSection):
    """What objectives on pairs of chosen and rejected have."""

    suffix_weight: NonNegative = 0.0
    """Weight of NLL on the original suffix as a further loss term."""
    chosen_weight: NonNegative = 0.0
    """Weight of NLL on the chosen candidates as a further loss term."""


class DpoObjective(PairObjective):
    """Online DPO on the best and worst candidates (method 5.4)."""

    name: Literal["dpo"]
    beta: Positive = 0.1
    logprobs: Literal["sum", "mean"] = "sum"
    """Of a candidate: summed over its tokens, or their mean (length-normalised, method 5.7)."""
    pair_sources: tuple[Source, ...] = ("suffix", "rewrite", "rollout")
    """Candidates that may be chosen or rejected; the others are scored and logged only."""
    pairs_per_pool: PositiveInt = 1
    """Best with worst, second best with second worst, and so on."""


class DpoRewriteObjective(PairObjective):
    """DPO of the rewrite over a rollout, without a judge (method 5.5)."""

    name: Literal["dpo_rewrite"]
    beta: Positive = 0.1
    logprobs: Literal["sum", "mean"] = "sum"
    pairs_per_pool: PositiveInt = 1
    """Rollouts that the rewrite is paired with."""


class SimpoObjective(PairObjective):
    """-log sigmoid(beta x (mean log-prob of chosen - of rejected) - gamma) (method 5.7)."""

    name: Literal["simpo"]
    beta: Positive = 2.0
    gamma: NonNegative = 0.5
    """Margin that the difference must reach, after beta."""
    pair_sources: tuple[Source, ...] = ("suffix", "rewrite", "rollout")
    pairs_per_pool: PositiveInt = 1


class GrpoObjective(ObjectiveSection):
    """Clipped policy gradient on all rollouts of a pool (method 5.6)."""

    name: Literal["grpo"]
    clip: Positive = 0.2
    """c: the ratio to the rollout's own log-prob counts within [1 - c, 1 + c]."""
    advantage: Literal["standardized", "centered"] = "standardized"
    """(r - mean) / (std + 1e-6) over the pool's valid rollouts, or r - mean alone (DrGRPO)."""
    token_divisor: PositiveInt | None = None
    """What the sum over a candidate's tokens is divided by; left out: its own number of tokens.
    DrGRPO divides by a constant: give data.suffix_tokens."""
    kl_weight: NonNegative = 0.0
    """lambda: weight of the KL to the reference, by the k3 estimator on sampled tokens."""
    suffix_weight: NonNegative = 0.0
    """Weight of NLL on the original suffix as a further loss term."""


Objective = Annotated[
    NllObjective
    | SftRewriteObjective
    | RfNllObjective
    | DpoObjective
    | DpoRewriteObjective
    | SimpoObjective
    | GrpoObjective,
    Field(discriminator="name"),
]


class FrozenReference(Section):
    """A second copy of the policy as it was when the first stage that compares with one began."""

    kind: Literal["frozen"]


class SnapshotReference(Section):
    """The same, taken anew from the policy while the run goes on."""

    kind: Literal["snapshot"]
    interval: PositiveInt
    """Optimizer steps between snapshots, counted from the run's first step."""


class RolloutReference(Section):
    """The log-probs that the rollout engine gave: no second model and no second pass."""

    kind: Literal["rollout"]


Reference = Annotated[
    FrozenReference | SnapshotReference | RolloutReference, Field(discriminator="kind")
]
ReferenceKind = Literal["none", "frozen", "snapshot", "rollout"]


def needs_rewards(objective: Objective) -> bool:
    """Whether the choice hangs on rewards; if not, no judge is asked."""
    return not isinstance(objective, NllObjective | SftRewriteObjective | DpoRewriteObjective)


def needs_reference(objective: Objective) -> bool:
    """Whether the loss compares the policy with a reference."""
    if isinstance(objective, GrpoObjective):
        return objective.kl_weight > 0
    return isinstance(objective, DpoObjective | DpoRewriteObjective)


def reference_kind(reference: Reference | None, objective: Objective) -> ReferenceKind:
    """What an objective is compared with: [reference], frozen where it is left out, or none."""
    if not needs_reference(objective):
        return "none"
    return reference.kind if reference is not None else "frozen"
