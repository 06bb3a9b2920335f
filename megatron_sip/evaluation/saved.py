"""The start policy's evaluation on disk, for a run that is resumed. NumPy's format, no pickle."""

from __future__ import annotations

import io
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from megatron_sip.evaluation.evaluate import PolicyOutput
from megatron_sip.publish import atomic_write
from megatron_sip.types import Candidate


def start_file(run_dir: Path, split: str) -> Path:
    """Where the start policy's evaluation on a split lies."""
    return run_dir / f"evaluation_start_{split}.npz"


def save_output(path: Path, output: PolicyOutput) -> None:
    """Write all that `compare` needs."""
    flat = [c for of_prefix in output.candidates for c in of_prefix]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        documents=output.documents,
        nll=output.nll,
        judge=output.judge,
        second=output.second,
        candidates_per_prefix=np.array([len(x) for x in output.candidates], np.int64),
        lengths=np.array([len(c.token_ids) for c in flat], np.int64),
        token_ids=np.concatenate([c.token_ids for c in flat]) if flat else np.zeros(0, np.int32),
    )
    atomic_write(path, buffer.getvalue())


def load_output(path: Path) -> PolicyOutput:
    """Read it back; the candidates have token ids alone.

    Raises: ValueError if the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is needed to compare the end with the start: "
            "restore it from a copy, or start the run anew"
        ) from None
    none = np.zeros(0, np.float32)
    flat = iter(np.split(arrays["token_ids"], np.cumsum(arrays["lengths"])[:-1]))
    candidates = tuple(
        tuple(Candidate("rollout", next(flat), "", none, 0, "length") for _ in range(count))
        for count in arrays["candidates_per_prefix"]
    )
    return PolicyOutput(
        documents=arrays["documents"],
        nll=arrays["nll"],
        candidates=candidates,
        judge=arrays["judge"],
        second=arrays["second"],
    )
