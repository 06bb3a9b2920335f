"""The logger of a run with the sinks that its recipe names; rank 0 only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_sip.config import Config
from megatron_sip.metrics import MetricLogger, Sink
from megatron_sip.sinks.guarded import GuardedSink
from megatron_sip.sinks.progress import Progress

Note = Callable[[str], None]


def open_logger(config: Config, progress: Progress, note: Note, *, after: int) -> MetricLogger:
    """metrics.jsonl and all sinks, ready for step `after` + 1.

    Args:   progress: told of every step; says at the end how the run ended.
            note: tells a person something, from any thread.
            after: step that the run goes on from.
    Raises: ValueError naming the key of a sink that cannot be opened; none is open then.
    """
    progress.log(after, {})
    logger = MetricLogger(config.run.dir, after=after)
    logger.sinks.append(progress)
    try:
        for name, sink in _sinks(config, progress, note, after, logger.last_step):
            logger.sinks.append(GuardedSink(name, sink, note))
    except BaseException:
        progress.ended = "failed"
        logger.close()
        raise
    return logger


def _sinks(
    config: Config, progress: Progress, note: Note, after: int, last_step: int
) -> Iterator[tuple[str, Sink]]:
    """Each sink as it is opened; libraries are imported only for those that the recipe names."""
    settings = config.metrics
    if settings.tensorboard:
        from megatron_sip.sinks.tensorboard import TensorBoardSink

        yield "tensorboard", TensorBoardSink(config.run.dir, after=after)
    if settings.wandb is not None:
        from megatron_sip.sinks.weights_and_biases import WandbSink

        yield "wandb", WandbSink(config, settings.wandb, progress, last_step=last_step, note=note)
    if settings.mlflow is not None:
        from megatron_sip.sinks.mlflow import MlflowSink

        yield "mlflow", MlflowSink(config, settings.mlflow, progress, note=note)
    if settings.prometheus is not None:
        from megatron_sip.sinks.prometheus import PrometheusSink

        yield "prometheus", PrometheusSink(settings.prometheus, progress)
