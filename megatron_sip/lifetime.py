"""A trainer rank's life: tied to torchrun's, and ended on request between two steps."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from megatron_sip.errors import RunFailed
from megatron_sip.supervision.heartbeat import HEART

PR_SET_PDEATHSIG = 1
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's own
SHUTDOWN_DEFAULT_S = 30  # torchrun's, too


def die_with_parent() -> bool:
    """Ask the kernel to SIGKILL this process when its parent is gone; call it first thing.

    Linux only; elsewhere it does nothing and says so.

    torchrun ends its ranks when it can; a SIGKILLed torchrun cannot, and its ranks would go on.
    The kernel watches the *thread* that started this process: torchrun starts ranks from its main
    thread, which lives as long as torchrun. Children of this process do not inherit the tie.

    Returns: True where the kernel does it (Linux), False where nothing was done.
    Raises: OSError if the kernel refuses.
    """
    if sys.platform != "linux":
        return False
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
    return True


class Stopped(RunFailed):
    """The run was asked to stop, saved a checkpoint and ended."""

    def __init__(self, signum: int, *, step: int) -> None:
        self.signum = signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved; go on "
            "with the same command and --resume"
        )


def patience_s() -> float:
    """Seconds that a step under way may take after a signal: half of what torchrun gives its ranks
    before it kills them; the other half is for the checkpoint."""
    return float(os.environ.get(SHUTDOWN_VARIABLE, SHUTDOWN_DEFAULT_S)) / 2


def _leave(signum: int) -> None:
    HEART.end(f"{signal.Signals(signum).name} came, and the step took too long")
    print(
        f"error: {signal.Signals(signum).name} came, and the step did not end within "
        f"{patience_s():.0f} s (torchrun sends SIGTERM also when another rank or a server died); "
        "ended without saving: --resume goes on from the last checkpoint and the pools recorded "
        f"since. For longer steps start torchrun with {SHUTDOWN_VARIABLE} set to more than twice "
        "the seconds of a step",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(128 + signum)


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 as a wish that the loop grants after its step; a second one ends
    at once.

    Schedulers announce a pre-emption by SIGTERM or SIGUSR1; torchrun hands on the latter with
    `--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1`.
    A context: after it the signals do what they did before, unless it is left by an exception: when
    a rank dies, torchrun sends SIGTERM to the others, which have last words to say. A signal that
    was ignored, such as SIGINT in a background job, stays so.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signum = 0  # 0: not asked
        self._before: dict[int, Any] = {}
        self._patience: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        heard = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._ask) for s in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.granted()
        if kind is None:
            self._restore()

    def granted(self) -> None:
        """The step is done and the run is about to save; there is no hurry any more."""
        if self._patience is not None:
            self._patience.cancel()

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        self._patience = threading.Timer(patience_s(), _leave, [signum])
        self._patience.daemon = True
        self._patience.start()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
