"""The thread of a rank that reports a wait without end, and does not outlive the other ranks.

A report says rank, step, phase and server and has the stacks of all threads; it goes to the rank's
log. Rank 0 also says on the terminal who is behind. Nothing is ended for being slow. A rank whose
peer on this host died ends at once: no step can be made without it, and torchrun starts all anew.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_sip.errors import RunFailed
from megatron_sip.supervision.heartbeat import (
    FOLLOWED,
    Heart,
    Record,
    path_of,
    read_record,
    read_records,
)

log = logging.getLogger(__name__)
TICK_S = 1.0
DYING_S = 2.0
GRACE_S = 3.0
"""What a rank gets for its own last words after another one died."""


class Monitor:
    """Watches this rank's heart; a context.

    Args of the constructor:
        folder: of all records. timeout_s: longest wait without a beat before it is reported.
        peers: ranks on this host. say: tells a person, on rank 0. clock: seconds that never jump.
    """

    def __init__(
        self,
        heart: Heart,
        folder: Path,
        *,
        timeout_s: float,
        peers: Sequence[int],
        say: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heart, self._folder, self._timeout_s = heart, folder, timeout_s
        self._peers, self._say, self._clock = tuple(peers), say, clock
        self._since, self._beats = clock(), heart.record.beats
        self._next_s = timeout_s
        self._before: dict[int, Record] = {}
        self._lost_since: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(TICK_S):
            self.look()
            if lost := self.lost_peers():
                leave(self._heart, lost)

    def look(self) -> None:
        """One look at this rank's own beats; reports a wait that is too long."""
        self._heart.write()
        record, now = self._heart.record, self._clock()
        main = read_record(path_of(self._folder, 0)) if record.rank else None
        if main is not None and main.attempt == record.attempt:
            self._heart.see_gone(main.gone)
        if record.beats != self._beats:
            self._since, self._beats, self._next_s = now, record.beats, self._timeout_s
            self._before = {}
        waited = now - self._since
        if self._say and not self._before and waited >= self._next_s / 2:
            self._before = self._records()
        if waited >= self._next_s:
            self._next_s *= 2
            self._report(record, waited)

    def _records(self) -> dict[int, Record]:
        attempt = self._heart.record.attempt
        return {r.rank: r for r in read_records(self._folder, attempt=attempt)}

    def _report(self, record: Record, waited: float) -> None:
        log.warning("%s has not moved for %.0f s; stacks:\n%s", record, waited, stacks())
        if self._say is None:
            return
        before, now = self._before, self._records()
        self._before = now
        moving = [r for n, r in now.items() if n in before and r.beats != before[n].beats]
        if moving:
            log.info("it waits for others, which go on: %s", moving[0])
            return
        behind = "; ".join(str(r) for r in who_is_behind(before, now)[:3])
        text = f"no progress for {waited:.0f} s (run.hang_timeout_s): {behind}; see logs/"
        log.warning(text)
        self._say(text)

    def lost_peers(self) -> list[Record]:
        """Ranks of this host and attempt that are gone for longer than the grace.

        None once this rank has said its last words: it is on its way out and cleans up.
        """
        lost = gone_peers(self._folder, self._peers, self._heart.record)
        if not lost or self._heart.record.ended:
            self._lost_since = None
            return []
        if self._lost_since is None:
            self._lost_since = self._clock()
        return lost if self._clock() - self._lost_since >= GRACE_S else []


def who_is_behind(before: dict[int, Record], now: dict[int, Record]) -> list[Record]:
    """Of ranks that all stand still, those that the others wait for.

    Who does not even write its record is frozen; else who waits for a server; else who is at the
    earliest step.
    """
    frozen = [r for n, r in now.items() if n in before and r.ticks == before[n].ticks]
    asking = [r for r in now.values() if r.waits]
    first = min((r.step for r in now.values()), default=0)
    return frozen or asking or [r for r in now.values() if r.step == first]


def gone_peers(folder: Path, peers: Sequence[int], mine: Record) -> list[Record]:
    """Ranks of this host and attempt whose processes are gone."""
    found = [read_record(path_of(folder, n)) for n in peers if n != mine.rank]
    return [r for r in found if r and r.attempt == mine.attempt and not r.lives]


class PeerLost(RuntimeError):
    """A rank cannot go on since another one died."""


@contextmanager
def last_words(heart: Heart, folder: Path, peers: Sequence[int]) -> Iterator[None]:
    """The code inside is all that this rank does: how it ends stands in its record.

    Raises: PeerLost in place of what a lost connection raises.
    """
    try:
        yield
    except (RunFailed, ValueError) as error:
        heart.end(str(error))
        raise
    except BaseException as error:
        if isinstance(error, RuntimeError) and (lost := just_lost(folder, peers, heart.record)):
            heart.end(blame(lost))
            raise PeerLost(f"{blame(lost)}; rank {heart.record.rank} ends, too") from error
        heart.end(f"{type(error).__name__}: {error}")
        raise
    heart.end("done")


def just_lost(folder: Path, peers: Sequence[int], mine: Record) -> list[Record]:
    """Ranks of this host that are gone without a word; a dying process closes its connections a
    moment before it is gone."""
    deadline = time.monotonic() + DYING_S
    while True:
        lost = [r for r in gone_peers(folder, peers, mine) if not r.ended]
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(0.05)


def blame(lost: Sequence[Record]) -> str:
    """Who died, where."""
    said = [f"{r}" + (f", which ended with: {r.ended}" if r.ended else "") for r in lost]
    return FOLLOWED + "; ".join(said)


def leave(heart: Heart, lost: Sequence[Record]) -> None:
    """End this process, since others are gone; the first rank that is left names them."""
    text = blame(lost)
    heart.end(text)
    log.error("%s; this rank ends, too", text)
    print(f"error: {text}; rank {heart.record.rank} ends, too", file=sys.stderr, flush=True)
    os._exit(1)


def stacks() -> str:
    """Python stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
