"""Megatron-Core on this process alone, as the benchmarks need it."""

from __future__ import annotations

import os

from megatron_sip.config import Parallel, PlatformConfig
from megatron_sip.parallel import initialize
from megatron_sip.platform import Platform, cpu
from megatron_sip.serving.ports import free_port


def single_rank() -> tuple[Platform, Parallel]:
    """Process groups of one rank over gloo, one thread."""
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    platform, parallel = cpu(PlatformConfig(kind="cpu")), Parallel(world_size=1)
    initialize(parallel, platform, seed=1)
    return platform, parallel
