"""Who does what among ranks. Pure.

Ranks are laid out tp-cp-ep-dp-pp as `parallel.initialize` does, so
rank = tp + TP x (dp + DP x pp); expert-parallel ranks are the first data-parallel ones, then the
next: ep = dp mod EP.
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
    experts = _experts(config, dp_rank) if config.parallel.expert_model_parallel_size > 1 else ""
    duties = [
        (experts != "", experts),
        (rank == 0, "run directory, metrics, summary"),
        (rank == 0 and starts, "starts and ends the servers"),
        (rank == 0 and sip, "sends the weights"),
        (tp_rank == 0 and pp_rank == 0, "I/O: samples" + (", rolls out, asks judges" * sip)),
        (tp_rank == 0 and pp_rank == last, "reports the loss"),
    ]
    return RankPlace(rank, tp_rank, pp_rank, dp_rank, tuple(d for holds, d in duties if holds))


def _experts(config: Config, dp_rank: int) -> str:
    """Which of each layer's experts a rank holds."""
    size = config.parallel.expert_model_parallel_size
    assert config.model.experts is not None
    each = config.model.experts.num_experts // size
    first = dp_rank % size * each
    return f"experts {first}-{first + each - 1}"
