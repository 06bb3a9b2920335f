"""`PREFIX.manifest.json`: what an indexed dataset was made of, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA = 2
PARTS = (".bin", ".idx", ".documents.parquet", ".eligible", ".manifest.json")  # as published


def part_path(prefix: Path, suffix: str) -> Path:
    """PREFIX + ".bin", ".idx", ...; a dot inside PREFIX is part of its name."""
    return prefix.with_name(prefix.name + suffix)


class Source(BaseModel):
    """One input file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    bytes: int


class Manifest(BaseModel):
    """Facts about PREFIX.bin and PREFIX.idx."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    schema_version: Literal[2] = SCHEMA
    made_by: Literal["preprocess", "adopt", "merge", "split"]
    split: str
    """Name of the split; empty: the inputs were not split."""
    split_shares: str
    """NAME=SHARE,... as given; empty: not split."""
    split_salt: str
    """Salt of the hash that splits; empty: not split."""
    documents: int
    tokens: int
    """End-of-document ids included."""
    dtype: Literal["uint16", "int32"]
    tokenizer_digest: str
    """sha256 of the tokenizer's file."""
    vocab_size: int
    eod: int
    """End-of-document id."""
    append_eod: bool
    """Each document ends with `eod`."""
    bad_records: int
    """Input records left out, over all splits."""
    idx_bytes: int
    idx_xxh3_128: str
    bin_bytes: int
    bin_xxh3_128: str
    sources: tuple[Source, ...]

    @property
    def data_digest(self) -> str:
        """16 hex digits that name the data: tokens, document borders, tokenizer, eod.

        Where the files lie and what they were made from do not count.
        """
        facts = [self.idx_xxh3_128, self.bin_xxh3_128, self.tokenizer_digest, self.vocab_size]
        facts += [self.eod, self.append_eod]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """xxh3 (128 bits, hex) of a file: finds accidents, not forgery."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def parse_manifest(text: str | bytes, *, name: str) -> Manifest:
    """Check a manifest's text.

    Raises: ValueError naming the file, the key and the remedy if it is not valid.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "file"
        raise ValueError(
            f"{name}: {key} is {str(first['input'])[:80]!r}: {first['msg']}; this version reads "
            f"schema {SCHEMA}; make the dataset again with tools/preprocess_data.py"
        ) from None


def load_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises: ValueError if the file is missing, no valid manifest, or of another schema version.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); make the dataset with "
            "tools/preprocess_data.py, or adopt an existing one with tools/dataset.py adopt"
        ) from None
    return parse_manifest(text, name=str(path))
