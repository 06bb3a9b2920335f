"""Seconds of each role on assumed hardware, and which role a step will wait for. Pure.

A role takes the longer of its arithmetic and its memory traffic (roofline). All numbers in
`Hardware` are assumptions; on a CPU none is made, and only shares of FLOPs are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.config import Config, StartServer
from megatron_sip.explain.hardware import Hardware
from megatron_sip.explain.roles import TRAINER, Role
from megatron_sip.explain.servers import ServerPlan

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class RoleTime:
    """Seconds of one role in an average step."""

    role: str
    place: str
    devices: int
    seconds: float | None
    bound: str
    """"arithmetic", "memory", or why there are no seconds."""


@dataclass(frozen=True)
class Bottleneck:
    """What a step is expected to wait for, and why."""

    times: tuple[RoleTime, ...]
    hardware: Hardware | None
    expected: str
    reasoning: tuple[str, ...]


def bottleneck(config: Config, roles: Sequence[Role], servers: Sequence[ServerPlan]) -> Bottleneck:
    """Compare the roles of a step (the loop is synchronous: their times add up)."""
    if config.platform.kind == "cpu":
        return _on_cpu(roles)
    hardware, by_name = Hardware(), {s.name: s for s in servers}
    times = tuple(
        _time(config, role, [by_name[n] for n in role.servers if n in by_name], hardware)
        for role in roles
    )
    known = [(t.seconds, t) for t in times if t.seconds is not None]
    seconds, slowest = max(known, key=lambda pair: pair[0])
    total = sum(value for value, _ in known)
    hours = total * config.run.steps / 3600
    reasons = [f"roles that are known take {total:.3g} s a step together ({hours:.3g} h a run), "
               f"{slowest.role} the longest of them with {seconds:.3g} s"]  # fmt: skip
    unknown = [r for r in roles if r.flops is None and not r.name.startswith("evaluation")]
    for role in unknown:
        reasons.append(
            f"{role.name}: the model behind server {role.place} is unknown; to take no longer "
            f"than the known roles together it must read {role.prompt_tokens / total:,.0f} prompt "
            f"tokens/s ({role.prompt_tokens:,.0f} a step, prefix cache hits included)"
        )
    expected = slowest.role
    if unknown:
        most = max(unknown, key=lambda role: role.prompt_tokens)
        expected = f"{most.name}, unless its servers are faster than stated below; then {expected}"
    return Bottleneck(times, hardware, expected, tuple(reasons))


def _time(config: Config, role: Role, servers: Sequence[ServerPlan], h: Hardware) -> RoleTime:
    """Seconds of one role, on the devices of `servers`, or else on the trainer's ranks."""
    trains = role.place == TRAINER
    devices = config.parallel.world_size if trains else sum(len(s.gpus) for s in servers)
    if role.flops is None or not devices:
        return RoleTime(role.name, role.place, devices, None, "model or devices unknown")
    if trains:
        peak = h.fp8_flops if config.platform.fp8 else h.bf16_flops
        seconds = role.flops / (devices * peak * h.train_utilisation)
        return RoleTime(role.name, role.place, devices, seconds, "arithmetic")
    arithmetic = role.flops / (devices * h.bf16_flops * h.serve_utilisation)
    memory = decode_bytes(role, servers, config) / (
        devices * h.memory_bandwidth * h.bandwidth_utilisation
    )
    bound = "arithmetic" if arithmetic >= memory else "memory"
    return RoleTime(role.name, role.place, devices, max(arithmetic, memory), bound)


def decode_bytes(role: Role, servers: Sequence[ServerPlan], config: Config) -> float:
    """Bytes that decoding reads: all weights once for each step of a full batch, and the KV cache.

    Servers that share a role share its requests, and each reads the weights for its own batches.
    A token that is made reads keys and values of its whole context, two bytes each in bf16.
    """
    settings, shape = config.servers[servers[0].name], servers[0].shape
    assert isinstance(settings, StartServer) and shape is not None
    if not role.requests or role.new_tokens <= role.requests:
        return 0.0
    size = BF16 if settings.dtype == "bfloat16" else FP32
    batches = max(float(len(servers)), role.requests / settings.max_num_seqs)
    weights = batches * role.new_tokens / role.requests * shape.parameters * size
    context = role.prompt_tokens / role.requests + role.new_tokens / role.requests / 2
    token = 2 * shape.num_layers * shape.key_value_size * size
    return weights + role.new_tokens * context * token


def _on_cpu(roles: Sequence[Role]) -> Bottleneck:
    """Shares of FLOPs alone."""
    times = tuple(RoleTime(r.name, r.place, 0, None, "not known on a CPU") for r in roles)
    known = [(r.flops, r) for r in roles if r.flops is not None]
    total = sum(flops for flops, _ in known)
    flops, largest = max(known, key=lambda pair: pair[0])
    reasons = [
        f"{largest.name} has {100 * flops / total:.0f} % of the FLOPs that are known",
        "not known: FLOP/s of these cores, their memory bandwidth, and how trainer and servers "
        "share them; so there are no seconds",
    ]
    if any(r.new_tokens > r.requests for r in roles):
        reasons.append(
            "decoding (rollout, rewrite) reads all weights for each batch of tokens, so it takes "
            "more time than its FLOPs say"
        )
    reasons += [
        f"{r.name}: the model behind server {r.place} is unknown and left out"
        for r in roles
        if r.flops is None
    ]
    return Bottleneck(times, None, largest.name, tuple(reasons))
