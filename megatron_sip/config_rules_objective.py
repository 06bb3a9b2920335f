"""Rules between [objective], [reference] and what a recipe's pools hold. Pure; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sip.config_objective import (
    DpoObjective,
    DpoRewriteObjective,
    GrpoObjective,
    RolloutReference,
    SftRewriteObjective,
    SimpoObjective,
    needs_reference,
)

if TYPE_CHECKING:
    from megatron_sip.config import Config

Rules = list[tuple[bool, str]]


def reference_rules(c: Config) -> Rules:
    """(holds, message): a reference is given only to an objective that compares with it."""
    objective = c.objective
    if c.reference is None:
        return []
    name = f'objective.name "{objective.name}"'
    if isinstance(objective, GrpoObjective):
        remedy = "remove it, or set objective.kl_weight above 0"
        rules = [
            (needs_reference(objective),
             f'[reference] is "{c.reference.kind}", but {name} with objective.kl_weight '
             f"{objective.kl_weight:g} compares with none; {remedy}"),
        ]  # fmt: skip
    else:
        rules = [
            (needs_reference(objective),
             f'[reference] is "{c.reference.kind}", but {name} compares with none; remove it'),
        ]  # fmt: skip
    if not isinstance(c.reference, RolloutReference):
        return rules
    engine = 'reference.kind "rollout" takes the log-probs of the rollout engine, which it has for'
    if isinstance(objective, DpoObjective):
        rules.append(
            (objective.pair_sources == ("rollout",),
             f"{engine} rollouts alone, but objective.pair_sources is {objective.pair_sources}; "
             'set it to ["rollout"], or reference.kind to "frozen"'))  # fmt: skip
    rules.append(
        (not isinstance(objective, DpoRewriteObjective),
         f'{engine} rollouts alone, but {name} prefers the rewrite; set reference.kind to "frozen"')
    )  # fmt: skip
    return rules


def source_rules(c: Config) -> Rules:
    """(holds, message): pools hold what the objective learns from, sampled as it assumes."""
    assert c.rollout and c.curriculum
    objective, k = c.objective, c.rollout.num_rollouts
    sources, name = c.curriculum.sources, f'objective.name "{c.objective.name}"'
    needed: dict[str, str] = {}
    rules: Rules = []
    if isinstance(objective, SftRewriteObjective):
        needed = {"rewrite": "learns the rewrite"}
    if isinstance(objective, DpoRewriteObjective):
        needed = {"rewrite": "prefers the rewrite", "rollout": "to a rollout"}
        rules.append(
            (objective.pairs_per_pool <= k,
             f"objective.pairs_per_pool {objective.pairs_per_pool} must not exceed "
             f"rollout.num_rollouts {k}: each pair has a rollout of its own"))  # fmt: skip
    if isinstance(objective, GrpoObjective):
        needed = {"rollout": "learns from all rollouts"}
        rules += [
            (c.rollout.temperature == 1.0,
             f"rollout.temperature is {c.rollout.temperature:g}, but {name} trains at temperature "
             "1; set it to 1.0"),
            (c.rollout.top_p == 1.0,
             f"rollout.top_p is {c.rollout.top_p:g}, but {name} takes rollouts for samples of the "
             "whole distribution; set it to 1.0"),
            (k >= 2,
             f"rollout.num_rollouts is {k}, but {name} compares the rollouts of a pool with each "
             "other; set it to 2 or more"),
        ]  # fmt: skip
    rules += [
        (source in sources,
         f'{name} {why}, but curriculum.sources {sources} has no "{source}"; add it')
        for source, why in needed.items()
    ]  # fmt: skip
    if isinstance(objective, DpoObjective | SimpoObjective):
        rules.append(
            (set(objective.pair_sources) <= set(sources),
             f"objective.pair_sources {objective.pair_sources} must be among "
             f"curriculum.sources {sources}"))  # fmt: skip
    return rules
