"""How tokenizing processes start: from a server process that has imported what they need.

Such a server is forked in a millisecond and, having no threads, safely, whatever threads the
process has that makes the dataset. Imports nothing of the package, so a program can begin with it
and import while the server does.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

# A server imports modules by their names and takes no arguments; it inherits this variable.
TOKENIZER = "MEGATRON_SIP_PRELOAD_TOKENIZER"


def context() -> BaseContext:
    """For a pool of tokenizing processes."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["megatron_sip.data.preprocess.preload"])
    return found


def begin(tokenizer: Path | None) -> None:
    """Start the server process (without it the first pool does), which loads the fast
    backend of this tokenizer once for all workers."""
    context()
    if tokenizer is not None:
        os.environ[TOKENIZER] = str(tokenizer)
    forkserver.ensure_running()
    os.environ.pop(TOKENIZER, None)
