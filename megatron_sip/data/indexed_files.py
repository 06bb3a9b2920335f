"""`.bin/.idx` files of a published dataset against their manifest; nothing is mapped, no torch."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megatron_sip.data.manifest import Manifest, file_digest, load_manifest, part_path

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}  # Megatron's codes of those we write
REMEDY = "make the dataset again with tools/preprocess_data.py"


def check_files(prefix: Path) -> Manifest:
    """Sizes, index header and index digest, before Megatron maps anything.

    Args:   prefix: path without `.bin`.
    Raises: ValueError naming file, sizes and remedy if a part is missing, truncated or altered.
            `.bin` is checked by size alone; `IndexedDataset.verify` reads it whole.
    """
    manifest = load_manifest(part_path(prefix, ".manifest.json"))
    index, data = part_path(prefix, ".idx"), part_path(prefix, ".bin")
    for path, expected in ((index, manifest.idx_bytes), (data, manifest.bin_bytes)):
        if not path.is_file():
            raise ValueError(f"{path}: no such file, its manifest says {expected} bytes; {REMEDY}")
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but its manifest says {expected}; "
                f"the file is truncated or altered; {REMEDY}"
            )
    if file_digest(index) != manifest.idx_xxh3_128:
        raise ValueError(f"{index} has another digest than its manifest says; {REMEDY}")
    _check_header(index, manifest)
    return manifest


def check_tokenizer(prefix: Path, manifest: Manifest, *, digest: str, path: Path) -> None:
    """Raises: ValueError if the data was made with another tokenizer than that at `path`."""
    if digest != manifest.tokenizer_digest:
        raise ValueError(
            f"{prefix} was made with another tokenizer (sha256 "
            f"{manifest.tokenizer_digest[:12]}) than {path} ({digest[:12]}); give the "
            f"same file, or {REMEDY}"
        )


def _check_header(index: Path, manifest: Manifest) -> None:
    """What the index says of itself against the manifest."""
    with open(index, "rb") as stream:
        header = stream.read(HEADER.size)
    magic, version, code, sequences, borders = (
        HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0, 0)
    )
    if (magic, version) != (MAGIC, 1) or code not in DTYPES:
        raise ValueError(f"{index}: {header[:18]!r} is no Megatron index header; {REMEDY}")
    dtype, expected = DTYPES[code], HEADER.size + 12 * sequences + 8 * borders
    if (dtype.name, borders - 1, expected) != (
        manifest.dtype, manifest.documents, manifest.idx_bytes,
    ) or manifest.tokens * dtype.itemsize != manifest.bin_bytes:  # fmt: skip
        raise ValueError(
            f"{index} says {borders - 1} documents of {dtype.name} in {expected} index bytes, "
            f"its manifest {manifest.documents} of {manifest.dtype} in {manifest.idx_bytes} and "
            f"{manifest.tokens} tokens in {manifest.bin_bytes} data bytes; {REMEDY}"
        )
