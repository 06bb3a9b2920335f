"""What a step used: FLOPs of the trainer, their share of the peak, device seconds by role. Pure.

A device is a GPU; on the CPU it is a thread that the recipe gives to a rank or a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sip.config import Config, StartServer
from megatron_sip.config_judge import NoveltyCriterion
from megatron_sip.explain.flops import causal_share, forward_flops, training_flops
from megatron_sip.explain.hardware import peak_flops
from megatron_sip.explain.shapes import Shape
from megatron_sip.types import TrainRows

PHASES = {
    "trainer": ("train", "sync"),
    "rollout": ("rollout", "sync"),
    "rewrite": ("rewrite",),
    "judge": ("judge",),
}
"""Role -> the phases in which its devices work; in "evaluate" all of them take turns."""


@dataclass(frozen=True)
class Devices:
    """How many devices a run holds from its first step to its last."""

    by_role: dict[str, int]
    """Trainer and served roles; roles whose devices nobody knows are absent."""
    total: int
    """Each device once, also where several roles share a server."""


def step_flops(
    shape: Shape, batches: Sequence[TrainRows], *, uses_reference: bool, platform_kind: str
) -> float:
    """FLOPs of the trainer on these micro-batches, over all ranks of one replica.

    Positions that pad a row count: they are computed.
    """
    total = 0.0
    for batch in batches:
        rows, length = batch.tokens.shape
        share = causal_share(platform_kind)
        total += training_flops(shape, rows=rows, length=length, causal_share=share)
        if uses_reference:
            total += forward_flops(shape, rows=rows, length=length, causal_share=share)
    return total


def devices_of(config: Config, *, servers: bool) -> Devices:
    """Devices of trainer and servers.

    Args: servers: the run has servers (a replay of recorded pools has none).
    """
    cpu = config.platform.kind == "cpu"
    trainer = config.parallel.world_size * (config.platform.num_threads if cpu else 1)
    by_role, held = {"trainer": trainer}, set()
    if servers:
        for role, names in _servers_of_roles(config).items():
            mine = [_server_devices(config, name) for name in names]
            if names and None not in mine:
                by_role[role] = len(set().union(*(m for m in mine if m is not None)))
        for name in config.servers:
            held |= _server_devices(config, name) or set()
    return Devices(by_role, trainer + len(held))


def _servers_of_roles(config: Config) -> dict[str, set[str]]:
    assert config.rollout is not None and config.judge is not None
    return {
        "rollout": set(config.rollout.servers),
        "rewrite": {config.rewriter.server} if config.rewriter else set(),
        "judge": {
            name
            for c in config.judge.criteria
            if not isinstance(c, NoveltyCriterion)
            for name in c.servers
        },
    }


def _server_devices(config: Config, name: str) -> set[str] | None:
    """Names of a server's devices; None where others run it."""
    server = config.servers[name]
    if not isinstance(server, StartServer):
        return None
    if config.platform.kind == "cpu":
        return {f"{name} thread {i}" for i in range(server.num_threads)}
    return {f"GPU {i}" for i in server.gpus}


def cost_metrics(devices: Devices, times: Mapping[str, float]) -> dict[str, float]:
    """cost/* of one step.

    Args: times: time/PHASE_s of the step by phase, time/step_s among them.
    """
    seconds = {role: sum(times.get(f"time/{p}_s", 0.0) for p in PHASES[role]) for role in PHASES}
    busy = {role: count * seconds[role] for role, count in devices.by_role.items()}
    if "time/evaluate_s" in times:
        busy["evaluation"] = devices.total * times["time/evaluate_s"]
    total = devices.total * times["time/step_s"]
    idle = {"idle": max(0.0, total - sum(busy.values()))}
    named = {f"cost/{role}_device_s": value for role, value in (busy | idle).items()}
    return named | {"cost/device_s": total}


def utilisation(
    flops: float, times: Mapping[str, float], *, num_ranks: int, peak_flops: float
) -> dict[str, float]:
    """model/mfu over the step, model/train_mfu over its train phase; fractions of the peak.

    Args: flops: of all ranks; peak_flops: FLOP/s of one rank's device.
    """
    phases = {"model/mfu": "time/step_s", "model/train_mfu": "time/train_s"}
    return {
        name: flops / (times[phase] * num_ranks * peak_flops)
        for name, phase in phases.items()
        if times.get(phase)
    }


def used(
    config: Config, metrics: Mapping[str, float], *, servers: bool, device_name: str
) -> dict[str, float]:
    """All of the above of one step; model/mfu where a peak is known.

    Args: metrics: of the step, with model/flops and its times; servers, device_name: see
          `devices_of` and `peak_flops`.
    """
    found = cost_metrics(devices_of(config, servers=servers), metrics)
    peak = peak_flops(config, device_name)
    if peak is not None:
        ranks = config.parallel.world_size
        found |= utilisation(metrics["model/flops"], metrics, num_ranks=ranks, peak_flops=peak)
    return found
