"""Tie a trainer rank's life to torchrun's. Linux only; elsewhere it does nothing and says so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> bool:
    """Ask the kernel to SIGKILL this process when its parent is gone; call it first thing.

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
