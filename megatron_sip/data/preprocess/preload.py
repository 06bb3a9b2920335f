"""What the server process imports before it forks workers: their module, and the fast
backend of the tokenizer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megatron_sip.data.preprocess import worker
from megatron_sip.data.preprocess.processes import TOKENIZER

if path := os.environ.pop(TOKENIZER, ""):
    # Whatever is wrong with the file, a worker meets it again and reports it to who asked.
    with contextlib.suppress(BaseException):
        worker.preload(Path(path))
