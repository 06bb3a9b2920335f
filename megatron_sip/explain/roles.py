"""Work of one step by role: who computes it, how many tokens, how many FLOPs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sip.config import Config
from megatron_sip.config_judge import AskedCriterion, NoveltyCriterion, PromptedCriterion
from megatron_sip.evaluation.evaluate import NUM_CANDIDATES, Evaluator
from megatron_sip.explain.flops import (
    Prompts,
    causal_share,
    forward_flops,
    serving_flops,
    training_flops,
)
from megatron_sip.explain.samples import Lengths
from megatron_sip.explain.shapes import Shape
from megatron_sip.explain.workload import Workload
from megatron_sip.rows import row_length

TRAINER = "trainer"
EVALUATIONS = 2  # of a run: the start policy and the end policy


@dataclass(frozen=True)
class Role:
    """One role's part of an average step, over all ranks or servers."""

    name: str
    place: str
    """"trainer", or the servers' names, joined by commas."""
    requests: float
    prompt_tokens: float
    """Sent to the server, or positions that the trainer computes."""
    new_tokens: float
    """Generated, at the most."""
    flops: float | None
    """With a working prefix cache; None: the model's size is unknown."""
    flops_without_cache: float | None

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the servers that share it; () for the trainer."""
        return () if self.place == TRAINER else tuple(self.place.split(", "))


def roles_of(
    config: Config,
    work: Workload,
    *,
    policy: Shape,
    served: Mapping[str, Shape | None],
    lengths: Lengths,
) -> tuple[Role, ...]:
    """All roles of one step of a curriculum stage.

    Args: served: shape of each server's model, None where it is unknown.
    """
    causal = causal_share(config.platform.kind)
    rows = {"rows": work.rows, "length": work.row_length, "causal_share": causal}
    roles = []
    if work.rollouts:
        assert config.rollout is not None
        roles.append(_rollout(config, work, served[config.rollout.servers[0]], lengths))
    if work.rewrites:
        assert config.rewriter is not None
        prompts = Prompts(
            work.rewrites, lengths.prompts["rewrite"], new_tokens=config.rewriter.max_tokens
        )
        server = config.rewriter.server
        roles.append(_served("rewrite", (server,), served[server], prompts))
    roles += _judges(config, work, served, lengths)
    if work.uses_reference:
        roles.append(
            Role("reference", TRAINER, 0, work.row_tokens, 0, *[forward_flops(policy, **rows)] * 2)
        )
    roles.append(
        Role("train", TRAINER, 0, work.row_tokens, 0, *[training_flops(policy, **rows)] * 2)
    )
    return (*roles, *_evaluation(config, work, policy, served, lengths))


def _served(name: str, servers: tuple[str, ...], shape: Shape | None, work: Prompts) -> Role:
    """A role that servers of one model share."""
    flops = [
        None if shape is None else serving_flops(shape, work, prefix_cache=cache)
        for cache in (True, False)
    ]
    tokens = work.requests * work.prompt_tokens
    written = work.requests * work.new_tokens
    return Role(name, ", ".join(servers), work.requests, tokens, written, *flops)


def _rollout(config: Config, work: Workload, shape: Shape | None, lengths: Lengths) -> Role:
    assert config.rollout is not None
    prompts = Prompts(
        work.rollouts, lengths.prefix, lengths.prefix, work.prompts, config.data.suffix_tokens
    )
    return _served("rollout", config.rollout.servers, shape, prompts)


def _judges(
    config: Config, work: Workload, served: Mapping[str, Shape | None], lengths: Lengths
) -> list[Role]:
    """One role a criterion; prompts of a pool share what stands before the candidates."""
    roles = []
    for criterion in config.judge.criteria if config.judge else ():
        count, name = work.verdicts[criterion.name], f"judge: {criterion.name}"
        if isinstance(criterion, NoveltyCriterion):
            roles.append(Role(name, TRAINER, 0, 0, 0, 0.0, 0.0))
            continue
        prompts = Prompts(
            requests=count,
            prompt_tokens=lengths.prompts[name],
            shared_tokens=lengths.shared[name],
            pools=work.prompts,
            scores_prompt=criterion.form == "likelihood",
            new_tokens=_written(criterion),
        )
        roles.append(_served(name, criterion.servers, served[criterion.servers[0]], prompts))
    return roles


def _written(criterion: AskedCriterion) -> int:
    """Tokens that a judge writes for one verdict, at the most."""
    if isinstance(criterion, PromptedCriterion) and criterion.answer.kind == "reasoned":
        return criterion.answer.max_tokens
    return 1


def _evaluation(
    config: Config,
    work: Workload,
    policy: Shape,
    served: Mapping[str, Shape | None],
    lengths: Lengths,
) -> list[Role]:
    """All evaluations of the run, spread over its steps."""
    settings, steps = config.evaluation, config.run.steps
    times = {settings.num_prefixes: EVALUATIONS}
    if settings.interval is not None:
        more = 1 + steps // settings.interval  # of the start policy, then of the policy
        times[settings.interval_prefixes] = times.get(settings.interval_prefixes, 0) + more
    dp = config.parallel.data_parallel_size
    causal = causal_share(config.platform.kind)
    padded = sum(count * _padded(n, dp) for n, count in times.items()) / steps
    n = sum(count * n for n, count in times.items()) / steps
    rows = padded * (2 if config.rollout else 1)  # the start policy scores continuations, too
    length = row_length(config.data.prefix_tokens, config.data.suffix_tokens, work.row_multiple)
    flops = forward_flops(policy, rows=rows, length=length, causal_share=causal)
    roles = [Role("evaluation", TRAINER, 0, rows * length, 0, flops, flops)]
    if config.rollout is None:
        return roles
    rollouts = Prompts(
        n * NUM_CANDIDATES,
        lengths.prefix,
        lengths.prefix,
        n,
        config.data.suffix_tokens,
    )
    scored = Prompts(n, lengths.prompts["evaluation: judge"], scores_prompt=True)
    for name, servers, prompts in (
        ("evaluation: rollout", config.rollout.servers, rollouts),
        ("evaluation: judge", (config.evaluation.server,), scored),
    ):
        roles.append(_served(name, servers, served[servers[0]], prompts))
    return roles


def _padded(num_prefixes: int, dp: int) -> int:
    """Rows that score so many prefixes, filled up to whole batches on each replica."""
    largest = -(-num_prefixes // dp)
    return dp * -(-largest // Evaluator.batch) * Evaluator.batch
