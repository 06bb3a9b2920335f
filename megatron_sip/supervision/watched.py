"""A rank's record and monitor for as long as it trains."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_sip.config import Config
from megatron_sip.console import StepConsole
from megatron_sip.parallel import Ranks
from megatron_sip.supervision import restarts
from megatron_sip.supervision.heartbeat import HEART
from megatron_sip.supervision.monitor import Monitor
from megatron_sip.supervision.restarts import Launch

log = logging.getLogger(__name__)


@contextmanager
def watched(
    config: Config, ranks: Ranks, launch: Launch, console: StepConsole
) -> Iterator[None]:  # fmt: skip
    """This rank's record and monitor; rank 0 says why torchrun started it anew."""
    records = config.run.dir / restarts.RECORDS
    if ranks.is_main:
        if reason := restarts.what_happened(config.run.dir, launch):
            log.warning(reason)
            console.note(reason)
        shutil.rmtree(records, ignore_errors=True)
    dist.barrier()  # those of the attempt before are gone
    HEART.open(records, rank=ranks.rank, attempt=launch.attempt)
    say = console.note if ranks.is_main else None
    timeout_s, peers = config.run.hang_timeout_s, launch.peers
    with Monitor(HEART, records, timeout_s=timeout_s, peers=peers, say=say):
        yield
