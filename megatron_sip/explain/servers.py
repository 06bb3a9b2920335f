"""The servers of a run and the exact commands that will start them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sip.config import Config, ConnectServer, StartServer
from megatron_sip.config_judge import NoveltyCriterion
from megatron_sip.explain.shapes import Shape, folder_shape
from megatron_sip.serving.server import server_command

PORT = "PORT"


@dataclass(frozen=True)
class ServerPlan:
    """One server."""

    name: str
    kind: Literal["start", "connect"]
    role: Literal["policy", "text"]
    users: tuple[str, ...]
    model: str
    url: str
    gpus: tuple[int, ...]
    shape: Shape | None
    weights: int | None
    """Bytes of the weights, over all its GPUs; None where the size is unknown."""
    unknown: str
    """Why the shape is None; empty if it is not."""
    command: tuple[str, ...]
    environment: dict[str, str]


def server_plans(config: Config, policy: Shape) -> tuple[ServerPlan, ...]:
    """All servers of the recipe.

    Raises: ValueError if a server's settings contradict the platform.
    """
    return tuple(_plan(config, name, policy) for name in config.servers)


def _users(config: Config, name: str) -> tuple[str, ...]:
    assert config.rollout is not None and config.judge is not None
    pairs = [("rollout", server) for server in config.rollout.servers]
    pairs.append(("evaluation", config.evaluation.server))
    pairs += [
        (f"judge: {c.name}", server)
        for c in config.judge.criteria
        if not isinstance(c, NoveltyCriterion)
        for server in c.servers
    ]
    if config.rewriter:
        pairs.append(("rewrite", config.rewriter.server))
    return tuple(user for user, server in pairs if server == name)


def _plan(config: Config, name: str, policy: Shape) -> ServerPlan:
    assert config.rollout is not None
    settings = config.servers[name]
    role: Literal["policy", "text"] = "policy" if name in config.rollout.servers else "text"
    shape, unknown = _shape(settings, role, policy)
    command, environment = ((), {})
    if isinstance(settings, StartServer):
        command, environment = _command(config, name, settings, role)
    return ServerPlan(
        name=name,
        kind=settings.kind,
        role=role,
        users=_users(config, name),
        model=str(settings.model),
        url=settings.url if isinstance(settings, ConnectServer) else "",
        gpus=settings.gpus if isinstance(settings, StartServer) else (),
        shape=shape,
        weights=_weights(settings, shape),
        unknown=unknown,
        command=command,
        environment=environment,
    )


def _shape(
    settings: StartServer | ConnectServer, role: str, policy: Shape
) -> tuple[Shape | None, str]:
    """Shape of the served model, or why it is unknown; a rollout server serves the policy."""
    if role == "policy" or (isinstance(settings, StartServer) and settings.model == "policy"):
        return policy, ""
    if isinstance(settings, ConnectServer):
        return None, 'kind = "connect": others run it'
    try:
        return folder_shape(Path(settings.model)), ""
    except ValueError as error:
        return None, str(error)


def _weights(settings: StartServer | ConnectServer, shape: Shape | None) -> int | None:
    if shape is None or isinstance(settings, ConnectServer):
        return None
    return shape.parameters * (2 if settings.dtype == "bfloat16" else 4)


def _command(
    config: Config, name: str, settings: StartServer, role: Literal["policy", "text"]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Command and environment as `services.start_fleet` will build them, the port left open."""
    assert config.rollout is not None
    exported = config.run.dir / "servers" / name
    argv, environment = server_command(
        settings,
        name=name,
        model_dir=exported if settings.model == "policy" else Path(settings.model),
        port=0,
        platform_kind=config.platform.kind,
        role=role,
        weight_transfer=config.rollout.weight_transfer if role == "policy" else None,
    )
    argv[argv.index("--port") + 1] = PORT
    return tuple(argv), environment
