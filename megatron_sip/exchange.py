"""When and how the policy's weights reach the rollout server, and the proof that they did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_sip.forward import token_logprobs
from megatron_sip.model import Policy
from megatron_sip.parallel import Ranks, broadcast_object, gather_objects
from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.vllm_engine import VllmEngine
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
    verified: bool = False
    version: int = -1  # policy version that the servers hold

    def connect(self) -> None:
        """Prepare the servers' side; again after a restart, which also asks for verification."""
        self.sender.connect()
        self.verified = False

    def sync(self, version: int, timer: Callable[[str], Any]) -> dict[str, tuple[float, float]]:
        """Publish policy version `version` on all rollout servers.

        Returns: sync/seconds and sync/pause_s on rank 0.
        Raises:  WeightExchangeFailed; the rollout servers are then unusable.
        """
        start = time.perf_counter()
        with timer("sync"):
            if self.control is not None:
                self.control.pause()
            paused = time.perf_counter()
            published = self.sender.send(version)
            if self.control is not None:
                self.control.resume()
            pause_s = time.perf_counter() - paused
            published = broadcast_object(published)  # nobody generates before this
            if self.engine is not None:
                self.engine.weight_version = published
            if not self.verified:
                self._verify()
            self.version = version
        if not self.ranks.is_main:
            return {}
        seconds = time.perf_counter() - start
        log.info("policy version %d is served, after %.2f s", version, seconds)
        return {"sync/seconds": (seconds, 1.0), "sync/pause_s": (pause_s, 1.0)}

    def _verify(self) -> None:
        """The server's log-probs of the probe must equal the trainer's."""
        reports = token_logprobs(self.policy.ddp, [self.probe])
        width = int((self.probe.segment_ids[0] >= 0).sum()) - 1  # a server also makes one token
        mine = reports[0][0, :width].cpu().numpy() if reports else None
        gathered = gather_objects(mine if self.ranks.reports_loss else None, self.ranks)
        if self.ranks.is_main:
            assert self.engine is not None
            trainer = next(x for x in gathered if x is not None)
            tokens = [*self.probe.tokens[0, :width].tolist(), int(self.probe.labels[0, width - 1])]
            gap = np.abs(self.engine.prompt_logprobs(tokens) - trainer)
            if not gap.mean() <= self.limit:
                raise WeightExchangeFailed(
                    f"after a weight exchange the rollout server's log-probs differ from the "
                    f"trainer's by {gap.mean():.3g} nats a token on average (largest "
                    f"{gap.max():.3g}); rollout.max_logprob_mismatch is {self.limit:.3g}; "
                    "compare dtype and attention backend of both, or raise the limit"
                )
        self.verified = True
        dist.barrier()

    def close(self) -> None:
        self.sender.close()
