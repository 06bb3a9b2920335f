"""The folder of an offline pass: `rewrites_NNNNNN.parquet`, each whole or absent, and a manifest.

`manifest.json` says what the rewrites depend on, so that a pass goes on with the same recipe only.
One row is one sample of the run, in order; a shard's rows depend on replies alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sip.publish import atomic_file, atomic_write
from megatron_sip.rewriting.acceptance import FAILED
from megatron_sip.rewriting.rewriter import Rewrite
from megatron_sip.types import SipSample

SCHEMA_VERSION = 1
SHARD_SAMPLES = 1024
MANIFEST = "manifest.json"
COLUMNS: dict[str, Any] = {
    "sample_id": pa.int64(), "document_id": pa.int64(), "cut": pa.int64(), "suffix": pa.string(),
    "reply": pa.string(), "rewrite": pa.string(), "token_ids": pa.list_(pa.int32()),
    "finish_reason": pa.string(), "outcome": pa.string(),
}  # fmt: skip


class Shards:
    """Shards of one pass.

    Args:   folder: holds nothing else; made if it is not there. identity: what the rewrites depend
            on. num_samples: of the pass. resume: go on with what is there.
    Raises: ValueError if the folder is not empty and `resume` is not given, or it was made
            otherwise; the message names the first difference.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, str], *, num_samples: int, resume: bool
    ) -> None:
        self._folder, self._identity, self._num_samples = folder, dict(identity), num_samples
        text = json.dumps(self._identity, sort_keys=True)
        self._digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._check(resume)
        for leftover in self._leftovers():
            leftover.unlink()
        self.outcomes: Counter[str] = Counter()
        """Of the shards that are done."""
        self.pending = [
            number for number in range(-(-num_samples // SHARD_SAMPLES)) if not self._done(number)
        ]

    def samples_of(self, number: int) -> range:
        """Sample ids of a shard."""
        first = number * SHARD_SAMPLES
        return range(first, min(first + SHARD_SAMPLES, self._num_samples))

    def write(
        self,
        number: int,
        samples: Sequence[SipSample],
        suffixes: Sequence[str],
        rewrites: Sequence[Rewrite],
    ) -> None:
        """One shard, whole or not at all.

        Args: suffixes: text of each suffix.
        """
        rows = [
            {
                "sample_id": s.sample_id, "document_id": s.document_id, "cut": s.cut,
                "suffix": suffix, "reply": r.reply, "rewrite": r.text,
                "token_ids": r.token_ids.tolist(), "finish_reason": r.finish_reason,
                "outcome": r.outcome,
            }
            for s, suffix, r in zip(samples, suffixes, rewrites, strict=True)
        ]  # fmt: skip
        metadata = {"megatron_sip.rewrites": str(SCHEMA_VERSION), "identity": self._digest}
        table = pa.Table.from_pylist(rows, schema=pa.schema(COLUMNS, metadata=metadata))
        with atomic_file(self._path(number)) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        self.outcomes += Counter(r.outcome for r in rewrites)

    def finish(self) -> None:
        """Say in the manifest that all is there."""
        self._write_manifest({"samples": self._num_samples, "outcomes": dict(self.outcomes)})

    def _check(self, resume: bool) -> None:
        path, remedy = self._folder / MANIFEST, "give another --output, or remove the folder"
        if not path.is_file():
            if self._folder.is_dir() and set(self._folder.iterdir()) - self._leftovers():
                raise ValueError(f"--output {self._folder} holds other files; {remedy}")
            self._write_manifest({})
            return
        if not resume:
            raise ValueError(
                f"--output {self._folder} holds rewrites; give --resume to go on, another "
                "--output, or remove the folder"
            )
        try:
            content = json.loads(path.read_bytes())
            version, was = content["schema_version"], dict(content["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {path} cannot be used ({error}); {remedy}") from None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"--resume: {path} has schema version {version}, this program reads "
                f"{SCHEMA_VERSION}; {remedy}"
            )
        for key in sorted(was.keys() | self._identity.keys()):
            if was.get(key) != self._identity.get(key):
                raise ValueError(
                    f"--resume: {key} was {was.get(key)}, is {self._identity.get(key)}; give the "
                    f"recipe that {self._folder} was made with, or another --output"
                )

    def _leftovers(self) -> set[Path]:
        """What a process that was killed had not finished writing."""
        return {
            path
            for name in (MANIFEST, "rewrites_*.parquet")
            for path in self._folder.glob(f".{name}.*.tmp")
        }

    def _write_manifest(self, facts: Mapping[str, Any]) -> None:
        content = {"schema_version": SCHEMA_VERSION, "identity": self._identity, **facts}
        atomic_write(self._folder / MANIFEST, json.dumps(content, indent=1).encode() + b"\n")

    def _path(self, number: int) -> Path:
        return self._folder / f"rewrites_{number:06d}.parquet"

    def _done(self, number: int) -> bool:
        """Whether a shard is there with all its samples and no failure; counts its outcomes.

        Raises: ValueError if it cannot be read or is of another pass.
        """
        path = self._path(number)
        if not path.exists():
            return False
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.schema_arrow.metadata or {}
                table = file.read(columns=["sample_id", "outcome"])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it") from None
        if metadata.get(b"identity") != self._digest.encode():
            raise ValueError(
                f"{path} is not of the pass that {MANIFEST} describes; give another --output, or "
                "remove the file"
            )
        wanted = self.samples_of(number)
        outcomes = table["outcome"].to_pylist()[: len(wanted)]
        if table["sample_id"].to_pylist()[: len(wanted)] != list(wanted) or FAILED in outcomes:
            return False
        self.outcomes += Counter(outcomes)
        return True
