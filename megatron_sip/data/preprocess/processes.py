"""How tokenizing processes start: from a server process that has imported what they need.

Such a server is forked in a millisecond and, having no threads, safely, whatever threads the
process has that makes the dataset. Imports nothing of the package, so a program can begin with it
and import while the server does.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def context() -> BaseContext:
    """For a pool of tokenizing processes."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["megatron_sip.data.preprocess.worker"])
    return found


def begin() -> None:
    """Start the server process; without it the first pool does."""
    context()
    forkserver.ensure_running()
