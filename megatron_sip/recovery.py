"""What all ranks do together when a server failed one of them: wait for it, exchange weights, ask
again.

Rank 0 starts dead servers anew (`serving.supervisor`). A rollout server comes back with random
weights, which only all ranks together can replace, so that a failed collection is given up on every
rank first. What was answered is not lost: verdicts and rewrites are in the cache, and rollouts are
sampled with the same seeds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_sip.errors import RunFailed, StepAbandoned
from megatron_sip.parallel import broadcast_object, shared_failure
from megatron_sip.rollout.control import WeightExchangeFailed
from megatron_sip.serving.health import ServerFailed
from megatron_sip.supervision.heartbeat import HEART

if TYPE_CHECKING:
    from megatron_sip.step import Run

log = logging.getLogger(__name__)
T = TypeVar("T")
Means = dict[str, tuple[float, float]]


def with_servers(run: Run, ask: Callable[[], T], *, during: str) -> T | None:
    """The answer of this I/O rank (None elsewhere), asked for again after a server came back.

    Args:   during: what the run does, for messages.
    Raises: StepAbandoned on every rank if a server or judge failed a rank for good.
    """
    while True:
        answer, failure = None, ""
        if run.ranks.is_io:
            try:
                answer = ask()
            except RunFailed as error:
                log.exception("%s", during)
                failure = str(error)
        if not (failure := shared_failure(failure, run.platform)):
            return answer
        recover(run, failure, during=during)


def publish(run: Run, *, first: bool = False) -> Means:
    """Exchange the present weights, again with servers that came back if one died over it.

    Every rank calls it. Args: first: with servers that were just started.
    Raises: StepAbandoned on every rank.
    """
    assert run.exchange is not None
    try:
        if first:
            run.exchange.connect()
        means = run.exchange.sync(run.state.policy_version, run.timer)
    except WeightExchangeFailed as error:
        during = (
            "first weight exchange" if first else f"weight exchange after step {run.state.step}"
        )
        return recover(run, str(error), during=during, broken=error.broken)
    if run.servers is not None:
        run.servers.exchanged()
    return means


def recover(run: Run, failure: str, *, during: str, broken: Collection[str] = ()) -> Means:
    """Wait for servers that died and give the rollout servers the present weights.

    Every rank calls it.

    Args:   failure: what a rank met. during: doing what. broken: servers that may not go on.
    Raises: StepAbandoned on every rank if no server of ours died: it would fail again.
    """
    while True:
        found = _settled(run, failure, broken) if run.ranks.is_main else None
        reason, endpoints, gone = broadcast_object(found)
        if reason:
            raise StepAbandoned(f"{during}: {reason}")
        HEART.accept(gone)
        if endpoints is None:
            return {}
        assert run.exchange is not None
        try:
            means = run.exchange.restore(endpoints, run.state.policy_version, run.timer)
        except WeightExchangeFailed as error:
            failure, broken = str(error), error.broken
            continue
        if run.servers is not None:
            run.servers.exchanged()
        return means


def _settled(run: Run, failure: str, broken: Collection[str]) -> tuple[str, Any, dict[str, int]]:
    """On rank 0: why there is nothing to do but stop; endpoints of all rollout servers if they need
    weights; how often each server went away by now."""
    if run.servers is None or run.config.rollout is None:
        return failure, None, {}
    try:
        with run.timer("recover"):
            died = run.servers.settle(broken=broken, reason=failure)
    except ServerFailed as error:
        return str(error), None, {}
    if not died:
        return failure, None, {}
    endpoints = None
    if run.servers.needs_weights():
        known = run.servers.endpoints()
        endpoints = [known[name] for name in run.config.rollout.servers]
    return "", endpoints, run.servers.gone()
