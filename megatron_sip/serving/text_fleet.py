"""Servers of a recipe for a tool that needs no policy: started or reached, and kept alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_sip.config import Config, StartServer
from megatron_sip.serving.fleet import Fleet
from megatron_sip.serving.supervisor import Supervisor
from megatron_sip.supervision.heartbeat import HEART


@contextmanager
def text_fleet(
    config: Config, names: Sequence[str], *, log_dir: Path, say: Callable[[str], None]
) -> Iterator[Supervisor]:
    """These servers of a recipe. One that dies is started anew, as in a run; once its restarts are
    spent, requests to it fail at once.

    Args:   log_dir: for the logs of started ones. say: tells a person who is started or waited for.
    Yields: their supervisor; `settle` waits for one that died.
    Raises: ServerFailed if one does not come up.
    """
    chosen = {name: config.servers[name] for name in names}
    folders = {n: Path(s.model) for n, s in chosen.items() if isinstance(s, StartServer)}
    log_dir.mkdir(parents=True, exist_ok=True)
    fleet = Fleet(
        chosen,
        model_dirs=folders,
        log_dir=log_dir,
        platform_kind=config.platform.kind,
        policy=(),
        weight_transfer="",
    )
    with fleet, Supervisor(fleet, policy=(), heart=HEART, say=say) as supervisor:
        for name in folders:
            say(f"starting server {name}, log {log_dir / name}.log")
        fleet.wait(
            lambda name, seconds: say(f"waiting for server {name}: {seconds:.0f} s"),
            names=chosen.keys() - folders.keys(),
        )
        supervisor.settle()
        yield supervisor
