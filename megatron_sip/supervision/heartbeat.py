"""What this process does, and who of a run's processes still lives: one small record a rank.

A record is `run.dir/ranks/rank00003.json`, written in place at each phase and each second, so that
it still says where a rank was when it was killed. All waits are counted in beats, never in times
of a clock that may jump: a beat is anything that moved the run on (a phase, a micro-batch, an
answered request, a word that a server is waited for).
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_sip.serving.sessions import read_process, start_time

RECORD_BYTES = 4096
LAST_WORDS_CHARACTERS = 300


@dataclass(frozen=True)
class Record:
    """One rank as it says it is."""

    rank: int
    host: str
    pid: int
    start: int
    """Start of the process in clock ticks since boot."""
    attempt: int
    """How often torchrun had restarted the job."""
    step: int = 0
    """The step under way, from 1 on; 0 while the run is set up."""
    phase: str = "start"
    beats: int = 0
    ticks: int = 0
    """Writes: they stand still when the process does."""
    waits: tuple[str, ...] = ()
    """Servers with requests in flight."""
    gone: dict[str, int] = field(default_factory=dict)
    """On rank 0: how often a server went away for good or with the weights that it held."""
    ended: str = ""
    """Why the process ends, as far as it could say."""

    @property
    def lives(self) -> bool:
        """Whether the process is there; one on another host is believed."""
        if self.host != socket.gethostname():
            return True
        process = read_process(self.pid)
        return process is not None and process.start == self.start

    def __str__(self) -> str:
        waits = f", waiting for {', '.join(self.waits)}" if self.waits else ""
        return f"rank {self.rank} (process {self.pid}) in {self.where}{waits}"

    @property
    def where(self) -> str:
        return f'phase "{self.phase}" of ' + (f"step {self.step}" if self.step else "the start")


class Heart:
    """This process's record. Safe in threads; before `open` it only counts."""

    def __init__(self) -> None:
        self._record = Record(0, socket.gethostname(), os.getpid(), start_time(os.getpid()), 0)
        self._waits: Counter[str] = Counter()
        self._gone: dict[str, int] = {}
        self._mourned: dict[str, int] = {}
        self._lock = threading.RLock()  # a signal's handler may beat, too
        self._file = -1

    def open(self, folder: Path, *, rank: int, attempt: int) -> None:
        """Keep the record in `folder` from now on."""
        folder.mkdir(parents=True, exist_ok=True)
        path = path_of(folder, rank)
        with self._lock:
            self.close()
            self._record = replace(self._record, rank=rank, attempt=attempt, ended="")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self.write()

    @property
    def record(self) -> Record:
        with self._lock:
            waits = tuple(sorted(name for name, number in self._waits.items() if number))
            return replace(self._record, waits=waits)

    def beat(self, *, step: int | None = None, phase: str | None = None) -> None:
        """The run moved on; a new step or phase is written at once."""
        with self._lock:
            known = self._record
            self._record = replace(
                known,
                beats=known.beats + 1,
                step=known.step if step is None else step,
                phase=known.phase if phase is None else phase,
            )
            if phase is not None or step is not None:
                self.write()

    @contextmanager
    def waiting_for(self, server: str) -> Iterator[None]:
        """A request to `server` is in flight."""
        with self._lock:
            self._waits[server] += 1
        try:
            yield
        finally:
            with self._lock:
                self._waits[server] -= 1
            self.beat()

    def see_gone(self, gone: dict[str, int]) -> None:
        """What rank 0 knows of servers that went away; asking them on is in vain."""
        with self._lock:
            self._gone = dict(gone)
            if self._record.rank == 0 and self._record.gone != gone:
                self._record = replace(self._record, gone=dict(gone))
                self.write()

    def accept(self, gone: dict[str, int]) -> None:
        """These went away and are back."""
        with self._lock:
            self._mourned = dict(gone)

    def is_gone(self, server: str) -> bool:
        with self._lock:
            return self._gone.get(server, 0) > self._mourned.get(server, 0)

    def end(self, why: str) -> None:
        """Last words; the first ones count."""
        with self._lock:
            if not self._record.ended:
                self._record = replace(self._record, ended=why[:LAST_WORDS_CHARACTERS])
                self.write()

    def write(self) -> None:
        """Write the record, if it has a file; what a full disk refuses is not worth a failure."""
        with self._lock:
            self._record = replace(self._record, ticks=self._record.ticks + 1)
            if self._file < 0:
                return
            text = json.dumps(asdict(self.record)).encode()
            try:
                os.pwrite(self._file, text[:RECORD_BYTES].ljust(RECORD_BYTES), 0)
            except OSError:
                return

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1


HEART = Heart()
"""Of this process."""


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.json"


def read_record(path: Path) -> Record | None:
    """A rank's record; None if there is none, or it is being written for the first time."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return Record(**fields | {"waits": tuple(fields["waits"])})


def read_records(folder: Path, *, attempt: int) -> list[Record]:
    """Records of one attempt, by rank."""
    found = [read_record(path) for path in sorted(folder.glob("rank*.json"))]
    return [record for record in found if record is not None and record.attempt == attempt]


def culprits(records: list[Record]) -> list[Record]:
    """Those of an attempt that ended who brought it down: who is gone without a word, or else whose
    words do not blame another rank's end."""
    silent = [r for r in records if not r.ended]
    return silent or [r for r in records if not r.ended.startswith(FOLLOWED)]


FOLLOWED = "lost "
"""How the last words of a rank begin that ends since another one did."""
