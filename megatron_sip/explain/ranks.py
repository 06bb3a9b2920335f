"""Who does what among ranks. Pure.

Ranks are laid out tp-cp-ep-dp-pp as `parallel.initialize` does, so
rank = tp + TP x (dp + DP x pp).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import Config, Parallel


@dataclass(frozen=True)
class RankPlace:
    """Coordinates and duties of one rank."""

    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    duties: tuple[str, ...]


def place(rank: int, parallel: Parallel) -> tuple[int, int, int]:
    """(tp_rank, pp_rank, dp_rank) of a global rank."""
    rest, tp_rank = divmod(rank, parallel.tensor_model_parallel_size)
    pp_rank, dp_rank = divmod(rest, parallel.data_parallel_size)
    return tp_rank, pp_rank, dp_rank


def all_ranks(config: Config) -> tuple[RankPlace, ...]:
    """Every rank with its duties beyond training its slice of the model."""
    return tuple(_rank(config, rank) for rank in range(config.parallel.world_size))


def _rank(config: Config, rank: int) -> RankPlace:
    tp_rank, pp_rank, dp_rank = place(rank, config.parallel)
    sip = config.run.task == "sip"
    last = config.parallel.pipeline_model_parallel_size - 1
    starts = any(server.kind == "start" for server in config.servers.values())
    duties = [
        (rank == 0, "run directory, metrics, summary"),
        (rank == 0 and starts, "starts and ends the servers"),
        (rank == 0 and sip, "sends the weights"),
        (tp_rank == 0 and pp_rank == 0, "I/O: samples" + (", rolls out, asks judges" * sip)),
        (tp_rank == 0 and pp_rank == last, "reports the loss"),
    ]
    return RankPlace(rank, tp_rank, pp_rank, dp_rank, tuple(d for holds, d in duties if holds))
