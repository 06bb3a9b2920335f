"""When and how the policy's weights reach the rollout servers, and the proof that they did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sip.forward import token_logprobs
from megatron_sip.model import Policy
from megatron_sip.parallel import Ranks, broadcast_object, gather_objects
from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.vllm_engine import BadReply, VllmEngine
from megatron_sip.serving.client import Endpoint, RequestFailed
from megatron_sip.types import TrainRows

log = logging.getLogger(__name__)


@dataclass
class WeightExchange:
    """One transaction: pause, send, publish a version, resume; every rank takes part.

    A server starts with random weights and version "default", so the first exchange is verified
    against something that was wrong before, and a restarted server cannot serve unnoticed.
    """

    sender: Any  # rollout.weight_transfer.Sender
    control: ControlClient | None  # rank 0 only
    engine: VllmEngine | None  # I/O ranks
    policy: Policy
    ranks: Ranks
    probe: TrainRows  # one row that holds the probe's tokens, the same on every rank
    limit: float  # nats
    moves: Callable[[], int]  # updates of the policy that changed its weights
    verified: bool = False
    version: int = -1  # policy version that the servers hold
    published_moves: int = -1  # what `moves` said then

    def connect(self) -> None:
        """Prepare the servers' side; the next exchange is verified."""
        self._together(self.sender.connect)
        self.verified = False

    def sync(self, version: int, timer: Callable[[str], Any]) -> dict[str, tuple[float, float]]:
        """Publish policy version `version` on all rollout servers.

        Returns: the metrics sync/* on rank 0.
        Raises:  WeightExchangeFailed, the same on every rank; nothing can be generated until an
                 exchange succeeds, and its `broken` servers must be restarted before (`restore`).
        """
        start = time.perf_counter()
        if self.engine is not None:
            self.engine.weight_version = ""
        with timer("sync"):
            published, pause_s = self._together(lambda: self._publish(version))
            if self.engine is not None:
                self.engine.weight_version = published
            if not self.verified:
                self._verify()
            self.version, self.published_moves = version, self.moves()
        if self.control is None:
            return {}
        seconds = time.perf_counter() - start
        log.info("policy version %d is served, after %.2f s", version, seconds)
        values = {"seconds": seconds, "pause_s": pause_s}
        values |= {f"{part}_s": s for part, s in self.sender.seconds.items()}
        values |= {f"server_s/{name}": s for name, s in self.control.seconds.items()}
        return {f"sync/{name}": (value, 1.0) for name, value in values.items()}

    def restore(
        self, endpoints: Sequence[Endpoint], version: int, timer: Callable[[str], Any]
    ) -> dict[str, tuple[float, float]]:
        """After one or more servers were restarted: form the group anew and exchange with all.

        Args:   endpoints: all rollout servers as they are now, in the order of rollout.server.
        Raises: as `sync`, also for a broken server that was not restarted.
        """
        if self.engine is not None:
            self.engine.weight_version = ""
            self.engine.endpoints = tuple(endpoints)
        if self.control is not None:
            control = self.control
            self._together(lambda: control.replace(endpoints))
        else:
            self._together(lambda: None)
        self.connect()
        return self.sync(version, timer)

    def _publish(self, version: int) -> tuple[str, float]:
        """Published version and seconds in which the servers were paused, on rank 0."""
        self.sender.begin()
        may_equal = self.moves() == self.published_moves
        if self.control is None:
            return self.sender.send(version, may_equal=may_equal), 0.0
        self.control.pause()
        paused = time.perf_counter()
        published = self.sender.send(version, may_equal=may_equal)
        self.control.resume()
        return published, time.perf_counter() - paused

    def _together(self, act: Callable[[], Any]) -> Any:
        """Act on every rank; rank 0's result, or its failure as an exception, on all of them."""
        if not self.ranks.is_main:
            act()
            result, failure = broadcast_object(None)
            if failure is not None:
                self.sender.abandon()
                self._forget()
                reason, details = failure
                raise WeightExchangeFailed(reason, **details)
            return result
        try:
            result = act()
        except Exception as error:
            if self.control is not None and self.control.failure is None:
                self.control.fail(str(error), phase="")  # what it left open is broken
            self.sender.abandon()
            self._forget()
            broadcast_object((None, _described(error)))
            raise
        return broadcast_object((result, None))[0]

    def _forget(self) -> None:
        """Nothing is published any more."""
        if self.engine is not None:
            self.engine.weight_version = ""

    def _verify(self) -> None:
        """Each server's log-probs of the probe must equal the trainer's."""
        reports = token_logprobs(self.policy.ddp, [self.probe])
        width = int((self.probe.segment_ids[0] >= 0).sum()) - 1  # a server also makes one token
        mine = reports[0][0, :width].cpu().numpy() if reports else None
        gathered = gather_objects(mine if self.ranks.reports_loss else None, self.ranks)
        tokens = [*self.probe.tokens[0, :width].tolist(), int(self.probe.labels[0, width - 1])]
        self._together(lambda: self._compare(gathered, tokens))
        self.verified = True

    def _compare(self, gathered: Sequence[np.ndarray | None], tokens: Sequence[int]) -> None:
        """On rank 0. Raises: WeightExchangeFailed naming the server that differs."""
        if self.control is None:
            return
        assert self.engine is not None
        trainer = next(x for x in gathered if x is not None)
        try:
            by_server = self.engine.prompt_logprobs(tokens)
        except (BadReply, RequestFailed) as error:
            reason = f"the probe after a weight exchange got no answer: {error}"
            raise self._refused(reason, error.server, broken={error.server}) from error
        for server, logprobs in by_server.items():
            gap = np.abs(logprobs - trainer)
            if not gap.mean() <= self.limit:
                reason = (
                    f"after a weight exchange the rollout server's log-probs differ from the "
                    f"trainer's by {gap.mean():.3g} nats a token on average (largest "
                    f"{gap.max():.3g}); rollout.max_logprob_mismatch is {self.limit:.3g}; "
                    "compare dtype and attention backend of both, or raise the limit"
                )
                raise self._refused(reason, server, broken=())  # a restart would change nothing

    def _refused(
        self, reason: str, server: str, *, broken: Collection[str]
    ) -> WeightExchangeFailed:
        assert self.control is not None
        return self.control.fail(reason, server=server, phase="verify", broken=broken)

    def close(self) -> None:
        self.sender.close()


def _described(error: Exception) -> tuple[str, dict[str, Any]]:
    """What the other ranks raise: reason, and who failed in what."""
    if not isinstance(error, WeightExchangeFailed):
        return f"{type(error).__name__}: {error}", {}
    details = {"server": error.server, "phase": error.phase, "broken": error.broken}
    return error.reason, details
