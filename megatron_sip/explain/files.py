"""Files that a run will write, with sizes by estimate. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import Config
from megatron_sip.explain.memory import FP32, takes_reference_later, weight_bytes
from megatron_sip.explain.parameters import Parameters
from megatron_sip.explain.samples import Lengths
from megatron_sip.explain.workload import Workload

CHARACTERS_PER_TOKEN = 4  # of text beside its token ids
VERDICT_BYTES = 40
SHARD_BYTES = 8_000  # of a Parquet file's own descriptions
STEP_LINE_BYTES = {"ntp": 700, "sip": 2_500}  # of metrics.jsonl
SMALL_BYTES = 50_000  # config, environment, summary


@dataclass(frozen=True)
class Files:
    """One kind of file."""

    path: str
    count: int
    bytes_each: int | None
    """None: not known beforehand."""
    note: str

    @property
    def bytes_total(self) -> int | None:
        return None if self.bytes_each is None else self.count * self.bytes_each


def run_files(
    config: Config, parameters: Parameters, work: Workload, lengths: Lengths
) -> tuple[Files, ...]:
    """All files of the run directory, and the verdict cache.

    Args: work: of the stage of the curriculum with the largest pools.
    """
    steps, sip = config.run.steps, config.run.task == "sip"
    files = [
        Files("config.toml, environment.json, summary.json", 1, SMALL_BYTES, "together, at most"),
        Files("evaluation_start_*.npz, report.html", 1, None, "the start's evaluation; the report"),
        Files("metrics.jsonl", steps, STEP_LINE_BYTES[config.run.task], "bytes a step"),
        Files("tensorboard/, wandb/, sinks.json", 1, None, "the same for the sinks of [metrics]"),
        Files(
            "checkpoints/step_*/", checkpoints_kept(config), checkpoint_bytes(config, parameters),
            "those kept at the end, one more while saving; weights, fp32 weights, two moments",
        ),
    ]  # fmt: skip
    if sip:
        weights = sum(parameters.total.values()) * weight_bytes(
            config.platform.kind, config.platform.fp8
        )
        later = references_kept(config)
        files += [
            Files("checkpoints/weights_*/", 1 + later, weights,
                  "start policy" + (", and the references of kept checkpoints" if later else "")),
            Files("pools/step_*.parquet", pools_at_most(config), pool_bytes(config, work, lengths),
                  ("the most at a time (run.keep_pools); " if config.run.keep_pools else "")
                  + f"all shards of a step ({config.parallel.data_parallel_size} files) and "
                  "marker; compression not counted"),
            Files(f"{config.judge.cache_dir if config.judge else ''}/*.sqlite", 1, None,
                  "verdicts and rewrites by content, outside the run directory"),
        ]  # fmt: skip
    return (*files, Files("logs/*.log", 1, None, "trainer ranks, servers, watchdog"))


def checkpoints_kept(config: Config) -> int:
    """Checkpoints that are left at the end: the newest ones, and those that are kept for good."""
    return len(_kept_steps(config))


def references_kept(config: Config) -> int:
    """Weights of references beside the start policy's that are left at the end, at the most."""
    if not takes_reference_later(config):
        return 0
    if config.reference is None or config.reference.kind != "snapshot":
        return 1
    taken = {(step - 1) // config.reference.interval for step in _kept_steps(config)}
    staged = config.curriculum is not None and config.curriculum.kind == "staged"
    return len(taken if staged else taken - {0})  # the one of step 0 is the start policy


def pools_at_most(config: Config) -> int:
    """Steps whose pools lie there at a time: just before a checkpoint is complete, whose pools and
    those before it go as `disk.tidy` has them go. An asynchronous one may be as
    late as the next."""
    steps, keep, every = config.run.steps, config.run.keep_pools, config.checkpoint.keep_every
    if keep is None:
        return steps
    saved, most, gone = _saved_steps(config), 0, 0
    later = saved[1:] + saved[-1:] if config.checkpoint.asynchronous else saved
    always = next((s for s in saved if every is not None and s % every == 0), steps)
    for i, step in enumerate(saved):
        most = max(most, later[i] - gone)
        oldest = min(saved[max(0, i + 1 - config.checkpoint.keep_last)], always)
        gone = max(gone, min(oldest, step - keep))
    return most


def _saved_steps(config: Config) -> list[int]:
    steps, interval = config.run.steps, config.checkpoint.interval
    return sorted({*range(interval, steps + 1, interval), steps})


def _kept_steps(config: Config) -> list[int]:
    settings, saved = config.checkpoint, _saved_steps(config)
    old = saved[: -settings.keep_last]
    every = settings.keep_every
    return [s for s in saved if s not in old or (every is not None and s % every == 0)]


def checkpoint_bytes(config: Config, parameters: Parameters) -> int:
    """Weights as trained, fp32 main weights and Adam's two moments, each once over all ranks."""
    size = weight_bytes(config.platform.kind, config.platform.fp8)
    return sum(parameters.total.values()) * (size + 3 * FP32)


def pool_bytes(config: Config, work: Workload, lengths: Lengths) -> int:
    """Pools of one step: candidates (ids, log-probs, text), verdicts, and each prefix once."""
    n, token = config.data.suffix_tokens, FP32 + CHARACTERS_PER_TOKEN
    candidates = work.prompts * work.candidates * n * token + work.rollouts * n * FP32
    prefixes = work.prompts * lengths.prefix * token
    verdicts = sum(work.verdicts.values()) * VERDICT_BYTES
    return round(
        candidates + prefixes + verdicts + SHARD_BYTES * config.parallel.data_parallel_size
    )
