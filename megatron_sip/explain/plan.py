"""A recipe -> everything that can be said of its run before it begins.

Reads files (tokenizer, data, model folders) where they are there; starts nothing, writes nothing,
allocates no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sip.config import Config
from megatron_sip.explain.files import Files, run_files
from megatron_sip.explain.host import Host, host_needs
from megatron_sip.explain.memory import Memory, rank_memory
from megatron_sip.explain.parameters import Parameters, count_parameters
from megatron_sip.explain.ranks import RankPlace, all_ranks
from megatron_sip.explain.roles import Role, roles_of
from megatron_sip.explain.room import lacks_room, this_machine
from megatron_sip.explain.samples import Data, Lengths, measure_lengths, open_files
from megatron_sip.explain.servers import ServerPlan, server_plans
from megatron_sip.explain.shapes import policy_shape
from megatron_sip.explain.speed import Bottleneck, bottleneck
from megatron_sip.explain.workload import Workload, plans, workload
from megatron_sip.platform import Platform
from megatron_sip.run_dir import refuse_secrets


@dataclass(frozen=True)
class Step:
    """An average step of one stage of the curriculum."""

    work: Workload
    roles: tuple[Role, ...]
    bottleneck: Bottleneck


@dataclass(frozen=True)
class Explanation:
    """What a run will do and cost. Bytes, tokens, FLOPs and seconds; a step is one over all ranks.
    """  # fmt: skip

    config: Config
    missing: tuple[str, ...]
    """What is wrong with the files and folders that the recipe names."""
    unfit: tuple[str, ...]
    """What does not fit: documents the cut, requests their server, the run this machine."""
    data: Data
    lengths: Lengths
    ranks: tuple[RankPlace, ...]
    parameters: Parameters
    memory: tuple[Memory, ...]
    host: Host
    servers: tuple[ServerPlan, ...]
    steps: tuple[Step, ...]
    files: tuple[Files, ...]

    @property
    def obstacles(self) -> tuple[str, ...]:
        """All that would stop the run before its first step, as things are here."""
        return self.missing + self.unfit


def explain(
    config: Config, *, missing: tuple[str, ...] = (), servers_start: bool = True
) -> Explanation:
    """Explain a valid recipe.

    Args:   missing: what `preflight.problems` found; () after a preflight that passed.
            servers_start: False for a replay of recorded pools.
    Raises: ValueError if the recipe cannot run anywhere: a server's settings contradict the
            platform, its URL carries a password, or a prompt does not exist.
    """
    refuse_secrets(config)  # all that the recipe holds is shown
    data, tokenizer, sampler = open_files(config)
    lengths = measure_lengths(config, tokenizer, sampler)
    policy = policy_shape(config.model, vocab_size=data.vocab_size)
    platform = describe_platform(config)
    parameters = count_parameters(config.model, config.parallel, vocab_size=data.vocab_size)
    servers = server_plans(config, policy)
    shapes = {server.name: server.shape for server in servers}
    steps = []
    for plan in plans(config):
        work = workload(config, plan, platform)
        roles = roles_of(config, work, policy=policy, served=shapes, lengths=lengths)
        steps.append(Step(work, roles, bottleneck(config, roles, servers)))
    most_rows = max((s.work for s in steps), key=lambda w: w.rows)
    largest_pool = max((s.work for s in steps), key=lambda w: w.candidates)
    memory = rank_memory(config, parameters, most_rows, policy)
    host = host_needs(config, parameters, vocab_size=data.vocab_size, dtype=platform.params_dtype)
    files = run_files(config, parameters, largest_pool, lengths)
    local = servers if servers_start else ()
    unfit = [data.missing] if data.missing and not missing else []
    unfit += too_long(config, steps[-1].roles) if servers_start else ()
    unfit += lacks_room(
        config, this_machine(config), memory=memory, host=host, servers=local, files=files
    )
    return Explanation(
        config=config,
        missing=missing,
        unfit=tuple(unfit),
        data=data,
        lengths=lengths,
        ranks=all_ranks(config),
        parameters=parameters,
        memory=memory,
        host=host,
        servers=servers,
        steps=tuple(steps),
        files=files,
    )


def describe_platform(config: Config) -> Platform:
    """The platform of the run as a description: no device is touched, nothing is patched."""
    if config.platform.kind == "cpu":
        return Platform("cpu", "gloo", torch.device("cpu"), torch.float32, None)
    return Platform("cuda", "nccl", torch.device("cuda"), torch.bfloat16, config.platform.fp8)


def too_long(config: Config, roles: Sequence[Role]) -> tuple[str, ...]:
    """Roles whose requests do not fit the server that gets them; it would refuse each."""
    found = []
    for role in roles:
        for name in role.servers if role.requests else ():
            server = config.servers[name]
            needed = (role.prompt_tokens + role.new_tokens) / role.requests
            if server.kind == "start" and needed > server.max_model_len:
                found.append(
                    f"{role.name}: a request has about {needed:,.0f} tokens, more than "
                    f"servers.{name}.max_model_len {server.max_model_len}; raise it, or lower "
                    "the prefix_tokens of who asks"
                )
    return tuple(found)
