"""TensorBoard: scalars in run.dir/tensorboard. NaN and infinities are written as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """One scalar a metric."""

    def __init__(self, run_dir: Path, *, after: int) -> None:
        """Args: after: step that the run goes on from; later points of an earlier start go.

        Raises: ValueError if the folder cannot be written.
        """
        folder = run_dir / "tensorboard"
        try:
            self._writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)
        except OSError as error:
            raise ValueError(
                f"metrics.tensorboard: cannot write {folder} ({error}); make it writable, or set "
                "metrics.tensorboard = false"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run has all its points

    def close(self) -> None:
        self._writer.close()
