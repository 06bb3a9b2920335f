"""Receiving side of the weight exchange over shared memory, without what it loads into.

Every bucket is checked in its turn and by its digests before a tensor of it is loaded; after the
last one the receiver writes down what it loaded, for the trainer to compare before it publishes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_sip.rollout.bucket_file import MappedBucket
from megatron_sip.rollout.digest import tensor_digest
from megatron_sip.rollout.ledger import Announcement, Receipt, UpdateLedger

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]


def receipt_path(root: Path, update: str, server: str, rank: int) -> Path:
    """Where worker `rank` of a server says what it loaded in an update."""
    return root / f"receipt-{update}-{server}-{rank}.json"


class Receiver:
    """One worker's part of an exchange."""

    def __init__(self, root: Path, *, server: str, rank: int, ledger: UpdateLedger) -> None:
        """Args:
        root: folder of the buckets and receipts.
        ledger: what this worker has accepted so far, in whatever folder.
        Raises: ValueError if the folder does not exist here.
        """
        if not root.is_dir():
            raise ValueError(f"weight exchange folder {root} does not exist on this host")
        self.root, self.server, self.rank, self.ledger = root, server, rank, ledger
        self.seconds = {"digest": 0.0, "apply": 0.0}  # of this update

    def start(self) -> None:
        self.ledger.start()
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def receive(self, file: str, bucket: Announcement, load: Load) -> None:
        """Check one bucket and load it.

        Raises: UpdateRefused if it is not what was due; whatever `load` raises. No update is
                accepted after either.
        """
        try:
            self.ledger.accept(bucket)
            if file in ("", "..") or Path(file).name != file:
                self.ledger.refuse(f"bucket {file!r} must be a file name without folders")
            receipt = self._load(file, bucket, load)
        except Exception as error:
            self.ledger.broken = self.ledger.broken or f"{type(error).__name__} {error}"
            raise
        if receipt is not None:
            self._write(receipt)

    def finish(self) -> None:
        """All of the update was received, and may be published."""
        self.ledger.finish()

    def _load(self, file: str, bucket: Announcement, load: Load) -> Receipt | None:
        started = time.perf_counter()
        try:
            mapped = MappedBucket(self.root / file)
            found = {name: tensor_digest(tensor) for name, tensor in mapped.tensors()}
        except (OSError, ValueError, RuntimeError) as error:
            self.ledger.refuse(f"bucket {file} cannot be read: {type(error).__name__} {error}")
        receipt = self.ledger.verify(found)
        checked = time.perf_counter()
        load((name, mapped.tensor(name)) for name in bucket.digests)
        mapped.keep()
        self.seconds["digest"] += checked - started
        self.seconds["apply"] += time.perf_counter() - checked
        return receipt

    def _write(self, receipt: Receipt) -> None:
        path = receipt_path(self.root, receipt.update, self.server, self.rank)
        half = path.with_suffix(".half")
        half.write_text(json.dumps(asdict(receipt) | {"seconds": self.seconds}))
        os.replace(half, path)
