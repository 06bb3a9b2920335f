"""A set of documents as a bitmap with a rank directory: `PREFIX.eligible` and other masks.

`select(k)`, the k-th document of the set, and `rank(i)`, how many of the set come before document
i, take a binary search and eight words, so a pass over the set needs no list of its documents.
The file is memory-mapped: 1.14 bits a document, read where it is asked.

File: magic, u32 length of the JSON header, header, padding to 64 bytes; then uint64 directory
[B + 1] (members before each block of 512 documents; little-endian) and uint64 words [8 B].

Source: Jacobson, "Space-efficient Static Trees and Graphs", FOCS 1989 (rank directory).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_sip.data.storage import map_file
from megatron_sip.publish import atomic_file

_MAGIC = b"SIPMASK1"
_START = struct.Struct("<8sI")
_BLOCK = 512  # documents; eight words
_MAX_HEADER = 1 << 20  # bytes


class MaskHeader(BaseModel):
    """What a mask says of itself."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    schema_version: Literal[1] = 1
    documents: int
    selected: int
    min_tokens: int
    """Every selected document has at least so many tokens, its end-of-document id not counted."""
    rule: str
    """How the documents were chosen; empty: by their length alone."""
    idx_xxh3_128: str
    """Digest of the .idx whose documents these are."""
    payload_xxh3_128: str


@dataclass(frozen=True)
class DocumentMask:
    """Members of a set of documents.

    Args: header: facts. directory: uint64[B + 1]. words: uint64[8 B], document i is bit i % 64 of
          word i // 64.
    """

    header: MaskHeader
    directory: np.ndarray
    words: np.ndarray

    @property
    def num_selected(self) -> int:
        """Documents in the set."""
        return self.header.selected

    def select(self, k: int) -> int:
        """Document number of the k-th member. Raises: ValueError if k is not in [0, selected)."""
        if not 0 <= k < self.header.selected:
            raise ValueError(f"mask: member {k} must be in [0, {self.header.selected})")
        block = int(np.searchsorted(self.directory, np.uint64(k), side="right")) - 1
        left = k - int(self.directory[block])
        words = np.asarray(self.words[8 * block : 8 * block + 8])
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return block * _BLOCK + int(np.flatnonzero(bits)[left])

    def rank(self, document: int) -> int:
        """Members before this document. Raises: ValueError if it is not in [0, documents]."""
        if not 0 <= document <= self.header.documents:
            raise ValueError(f"mask: document {document} must be in [0, {self.header.documents}]")
        block, inside = divmod(document, _BLOCK)
        words = np.asarray(self.words[8 * block : 8 * block + 8])
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return int(self.directory[block]) + int(bits[:inside].sum())

    def __contains__(self, document: int) -> bool:
        if not 0 <= document < self.header.documents:
            return False
        return bool(int(self.words[document // 64]) >> document % 64 & 1)

    def members(self) -> np.ndarray:
        """bool[documents]."""
        bits = np.unpackbits(np.asarray(self.words).view(np.uint8), bitorder="little")
        return bits[: self.header.documents].astype(bool)

    def save(self, path: Path) -> None:
        """Write atomically."""
        header = self.header.model_dump_json().encode()
        header += b" " * (-(_START.size + len(header)) % 64)
        with atomic_file(path) as temporary, open(temporary, "wb") as stream:
            stream.write(_START.pack(_MAGIC, len(header)) + header)
            stream.write(self.directory.tobytes() + self.words.tobytes())


def mask_of(
    members: np.ndarray, *, min_tokens: int, rule: str = "", idx_xxh3_128: str = ""
) -> DocumentMask:
    """The set of documents i with members[i].

    Args: members: bool[documents]. The rest: as in `MaskHeader`.
    """
    return mask_of_bits(
        np.packbits(members, bitorder="little"),
        documents=len(members),
        min_tokens=min_tokens,
        rule=rule,
        idx_xxh3_128=idx_xxh3_128,
    )


def mask_of_bits(
    bits: np.ndarray, *, documents: int, min_tokens: int, rule: str = "", idx_xxh3_128: str = ""
) -> DocumentMask:
    """The set of documents whose bit is 1.

    Args: bits: uint8[ceil(documents / 8)], document i is bit i % 8 of byte i // 8. The rest: as in
          `MaskHeader`.
    """
    blocks = -(-documents // _BLOCK)
    padded = np.zeros(blocks * _BLOCK // 8, np.uint8)
    padded[: len(bits)] = bits
    words = padded.view("<u8")
    directory = np.zeros(blocks + 1, "<u8")
    counts = np.bitwise_count(words).reshape(blocks, 8).sum(axis=1, dtype=np.uint64)
    np.cumsum(counts, out=directory[1:])
    header = MaskHeader(
        documents=documents,
        selected=int(directory[-1]),
        min_tokens=min_tokens,
        rule=rule,
        idx_xxh3_128=idx_xxh3_128,
        payload_xxh3_128=_payload_digest(directory, words),
    )
    return DocumentMask(header, directory, words)


def load_header(path: Path) -> MaskHeader:
    """Read and check the header alone, with the file's size.

    Raises: ValueError if the file is missing, no mask, damaged in its header, or truncated.
    """
    return _load_header(path)[0]


def load_mask(path: Path) -> DocumentMask:
    """Map a mask and check its digest.

    Raises: ValueError if the file is missing, no mask, truncated or altered.
    """
    header, start = _load_header(path)
    blocks = -(-header.documents // _BLOCK)
    mapped = map_file(path)[start:].view("<u8")
    mask = DocumentMask(header, mapped[: blocks + 1], mapped[blocks + 1 :])
    if _payload_digest(mask.directory, mask.words) != header.payload_xxh3_128:
        raise ValueError(f"{path}: the bitmap was altered (digest); {_REMEDY}")
    return mask


_REMEDY = "make it again with tools/dataset.py mask"


def _payload_digest(directory: np.ndarray, words: np.ndarray) -> str:
    state = xxhash.xxh3_128(np.ascontiguousarray(directory).data)
    state.update(np.ascontiguousarray(words).data)
    return state.hexdigest()


def _load_header(path: Path) -> tuple[MaskHeader, int]:
    """(header, offset of the payload)."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(_START.size)
            magic, length = _START.unpack(start) if len(start) == _START.size else (b"", 0)
            if magic != _MAGIC or length > _MAX_HEADER:
                raise ValueError(f"{path}: {start!r} does not begin a mask; {_REMEDY}")
            text = stream.read(length)
            size = stream.seek(0, 2)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None
    try:
        header = MaskHeader.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "header"
        raise ValueError(f"{path}: {key}: {first['msg']}; {_REMEDY}") from None
    blocks = -(-header.documents // _BLOCK)
    if size != _START.size + length + 8 * (9 * blocks + 1):
        raise ValueError(
            f"{path} has {size} bytes, but {header.documents} documents need "
            f"{_START.size + length + 8 * (9 * blocks + 1)}; {_REMEDY}"
        )
    return header, _START.size + length
