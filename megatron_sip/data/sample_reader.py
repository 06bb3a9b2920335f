"""Samples of a step, with those of the next steps read ahead of their turn.

Reading ahead moves nothing: samples are asked for by number, and one that was not foreseen is read
when it is asked for. All reading is done by one thread, so files need no locks; `close` ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from megatron_sip.types import SipSample


class Samples(Protocol):
    """Samples by number."""

    def __getitem__(self, i: int) -> SipSample: ...


class SampleReader:
    """Reads `positions` of a step's batch, and the same positions of the next `steps` batches.

    Args: samples: by number. batch: samples of one step over all ranks. steps: to read ahead.

    A context manager: without `close` the interpreter reads all that was foreseen before it ends.
    """

    def __init__(self, samples: Samples, *, batch: int, steps: int) -> None:
        self._samples, self._batch, self._steps = samples, batch, steps
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._ahead: dict[int, Future[SipSample]] = {}

    def read(self, first: int, positions: Sequence[int]) -> list[SipSample]:
        """Samples first + p. Raises: what reading them raises."""
        wanted = [first + int(p) for p in positions]
        now = [self._asked(i) for i in wanted]
        later = [i + n * self._batch for n in range(1, self._steps + 1) for i in wanted]
        self._ahead = {i: self._asked(i) for i in later}
        return [future.result() for future in now]

    def close(self) -> None:
        """Give up what was read ahead; what is being read is waited for. `read` cannot follow."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._ahead = {}

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, i: int) -> Future[SipSample]:
        return self._ahead.get(i) or self._reader.submit(self._samples.__getitem__, i)
