"""Parts of a published dataset against its manifest; no torch."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sip.data.manifest import Manifest, file_digest, load_manifest
from megatron_sip.data.storage import is_url, local_part

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}  # Megatron's codes of those we write
CODES = {dtype: code for code, dtype in DTYPES.items()}
REMEDY = "make the dataset again with tools/preprocess_data.py"


@dataclass(frozen=True)
class IndexHeader:
    """First bytes of a `.idx`. Args: sequences, documents: how many. dtype: of the token ids."""

    sequences: int
    documents: int
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Size that the whole file must have."""
        return HEADER.size + 12 * self.sequences + 8 * (self.documents + 1)


def read_header(index: Path) -> IndexHeader:
    """Header of an index file, against the file's size.

    Raises: ValueError if it is no Megatron index, of a type we do not read, truncated or longer.
    """
    try:
        with open(index, "rb") as stream:
            header = stream.read(HEADER.size)
            size = stream.seek(0, 2)
    except OSError as error:
        raise ValueError(f"{index} cannot be read ({error.strerror}); {REMEDY}") from None
    magic, version, code, sequences, borders = (
        HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0, 0)
    )
    if (magic, version) != (MAGIC, 1) or borders < 1:
        raise ValueError(f"{index}: {header[:18]!r} is no Megatron index header; {REMEDY}")
    if code not in DTYPES:
        raise ValueError(
            f"{index}: type code {code} is neither int32 (4) nor uint16 (8), which token ids "
            f"need; {REMEDY}"
        )
    found = IndexHeader(sequences, borders - 1, DTYPES[code])
    if size != found.bytes:
        raise ValueError(
            f"{index} has {size} bytes, but {sequences} sequences and {borders - 1} documents "
            f"need {found.bytes}; the file is truncated, altered or multimodal; {REMEDY}"
        )
    return found


def check_sizes(prefix: str | Path, manifest: Manifest, *, cache_dir: Path | None = None) -> None:
    """Sizes of `.idx` and `.bin`, by their directory entries alone.

    Raises: ValueError naming file, sizes and remedy if one is missing, truncated or longer.
    """
    parts = {".idx": manifest.idx_bytes} if is_url(prefix) else {
        ".idx": manifest.idx_bytes, ".bin": manifest.bin_bytes,
    }  # fmt: skip
    for suffix, expected in parts.items():
        path = local_part(prefix, suffix, cache_dir=cache_dir)
        try:
            size = path.stat().st_size
        except OSError:
            raise ValueError(
                f"{path}: no such file, its manifest says {expected} bytes; {REMEDY}"
            ) from None
        if size != expected:
            raise ValueError(
                f"{path} has {size} bytes, but its manifest says {expected}; "
                f"the file is truncated or altered; {REMEDY}"
            )


def check_index_digest(prefix: str | Path, manifest: Manifest, *, cache_dir: Path | None) -> None:
    """Read `.idx` whole. Raises: ValueError if its digest is not the manifest's."""
    index = local_part(prefix, ".idx", cache_dir=cache_dir)
    if file_digest(index) != manifest.idx_xxh3_128:
        raise ValueError(f"{index} has another digest than its manifest says; {REMEDY}")


def check_files(prefix: str | Path, *, cache_dir: Path | None = None) -> Manifest:
    """Sizes, index header and index digest.

    Args:   prefix: path or URL without `.bin`.
    Raises: ValueError naming file, sizes and remedy if a part is missing, truncated or altered.
            `.bin` is checked by size alone; `tools/dataset.py verify` reads it whole.
    """
    manifest = check_headers(prefix, cache_dir=cache_dir)
    check_index_digest(prefix, manifest, cache_dir=cache_dir)
    return manifest


def check_headers(prefix: str | Path, *, cache_dir: Path | None = None) -> Manifest:
    """What can be checked without reading a file whole: sizes, and the index's header.

    Raises: ValueError naming file, sizes and remedy if a part is missing, truncated or not what the
            manifest says.
    """
    manifest = load_manifest(local_part(prefix, ".manifest.json", cache_dir=cache_dir))
    check_sizes(prefix, manifest, cache_dir=cache_dir)
    index = local_part(prefix, ".idx", cache_dir=cache_dir)
    header = read_header(index)
    if (header.dtype.name, header.documents) != (manifest.dtype, manifest.documents) or (
        manifest.tokens * header.dtype.itemsize != manifest.bin_bytes
    ):
        raise ValueError(
            f"{index} says {header.documents} documents of {header.dtype.name}, its manifest "
            f"{manifest.documents} of {manifest.dtype} and {manifest.tokens} tokens in "
            f"{manifest.bin_bytes} data bytes; {REMEDY}"
        )
    return manifest


def check_tokenizer(prefix: str | Path, manifest: Manifest, *, digest: str, path: Path) -> None:
    """Raises: ValueError if the data was made with another tokenizer than that at `path`."""
    if digest != manifest.tokenizer_digest:
        raise ValueError(
            f"{prefix} was made with another tokenizer (sha256 "
            f"{manifest.tokenizer_digest[:12]}) than {path} ({digest[:12]}); give the "
            f"same file, or {REMEDY}"
        )
