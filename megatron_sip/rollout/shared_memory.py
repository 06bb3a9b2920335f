"""Sends the policy's weights through shared memory, on one CPU host.

Two slots of one bucket each: while the servers load from one, the next bucket is copied into the
other. Before the version is published, every worker's receipt must say that it loaded the very
bytes that were sent; a server that answers and does nothing has none.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_sip.rollout.bucket_file import NUM_SLOTS, Layout, Slot, plan_buckets, shared_memory
from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.digest import bytes_digest
from megatron_sip.rollout.ledger import Announcement, Receipt, Whole
from megatron_sip.rollout.receiver import receipt_path
from megatron_sip.rollout.weight_source import MegatronWeightSource
from megatron_sip.rollout.weight_transfer import Walk
from megatron_sip.serving.sessions import TEMP_PREFIX


class SharedMemorySender:
    """Buckets as safetensors files in shared memory."""

    def __init__(
        self, source: MegatronWeightSource, control: ControlClient | None, *, bucket_bytes: int
    ) -> None:
        self._source, self._control, self._limit = Walk(source), control, bucket_bytes
        self._root: Path | None = None
        self._plan: tuple[Layout, ...] = ()
        self._slots: list[Slot] = []
        self._workers: dict[str, int] = {}  # of each server
        self.seconds = {"transport": 0.0, "digest": 0.0, "apply": 0.0}  # of the last send
        if control is not None:
            prefix = f"{TEMP_PREFIX}{os.getpid()}-"
            self._root = Path(tempfile.mkdtemp(prefix=prefix, dir=shared_memory()))

    @property
    def root(self) -> Path | None:
        """Folder of the buckets on rank 0; the watchdog removes it if the trainer is killed."""
        return self._root

    def connect(self) -> None:
        """Tell the servers where buckets will be (again after a restart)."""
        if self._control is not None:
            self._control.init_weight_transfer_engine({"root": str(self._root)})
            names = [endpoint.name for endpoint in self._control.endpoints]
            self._workers = dict(zip(names, self._control.world_sizes(), strict=True))

    def begin(self) -> None:
        self._source.begin()

    def send(self, version: int, *, may_equal: bool) -> str:
        if self._control is None:
            for _ in self._source:  # join the gathers
                pass
            return ""
        self._prepare()
        self._control.start_weight_update()
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        receipt = self._send_buckets(self._control, version, may_equal=may_equal)
        self._check_receipts(self._control, receipt)
        published = f"{version}-{receipt.whole}"
        self._control.finish_weight_update(published)
        return published

    def _prepare(self) -> None:
        """Plan once; every update goes the same way."""
        if self._slots:
            return
        assert self._root is not None
        stream = ((m.name, m.dtype, m.shape) for m in self._source.metadata())
        self._plan, size = plan_buckets(stream, self._limit)
        paths = [self._root / f"slot_{i}.safetensors" for i in range(NUM_SLOTS)]
        try:
            self._slots = [Slot(path, size) for path in paths]
        except OSError as error:
            raise WeightExchangeFailed(
                f"{self._root}: no room for {NUM_SLOTS} buckets of {size / 2**20:.0f} MiB: "
                f"{error}; lower rollout.bucket_mib, or enlarge {self._root.parent}",
                phase="start",
            ) from error

    def _send_buckets(self, control: ControlClient, version: int, *, may_equal: bool) -> Receipt:
        update, whole, count = secrets.token_hex(8), Whole(), len(self._plan)
        num_tensors = sum(len(layout.places) for layout in self._plan)
        stream = iter(self._source)
        call: Future[None] | None = None
        with ThreadPoolExecutor(max_workers=1) as caller:
            for index, layout in enumerate(self._plan):
                slot = self._slots[index % NUM_SLOTS]
                digests = self._fill(slot, layout, stream)
                whole.add(digests)
                last = index == count - 1
                if last and next(stream, None) is not None:
                    raise ValueError("the weight source yields more tensors than it announced")
                bucket = Announcement(
                    update, version, index, count, num_tensors, digests,
                    whole.digest if last else "", may_equal,
                )  # fmt: skip
                if call is not None:
                    call.result()  # the slot that is filled next is free again
                info = {"file": slot.path.name, "bucket": asdict(bucket)}
                call = caller.submit(control.update_weights, info)
            if call is None:
                raise ValueError("the weight source announces no tensor")
            call.result()
        return Receipt(update, version, whole.digest, num_tensors)

    def _fill(
        self, slot: Slot, layout: Layout, stream: Iterator[tuple[str, torch.Tensor]]
    ) -> dict[str, str]:
        """Copy the stream's next tensors into the slot; their digests.

        Raises: ValueError if they are not the announced ones.
        """
        digests = {}
        slot.begin(layout)
        for place in layout.places:
            name, tensor = next(stream, ("nothing", torch.empty(0)))
            found, expected = (name, tensor.dtype, tuple(tensor.shape)), (place.name, place.dtype,
                                                                          place.shape)  # fmt: skip
            if found != expected:
                raise ValueError(f"the weight source yields {found}, but announced {expected}")
            started = time.perf_counter()
            slot.write(place, tensor.detach())
            copied = time.perf_counter()
            digests[name] = bytes_digest(place.dtype, place.shape, slot.content(place))
            self.seconds["transport"] += copied - started
            self.seconds["digest"] += time.perf_counter() - copied
        return digests

    def _check_receipts(self, control: ControlClient, sent: Receipt) -> None:
        """Raises: WeightExchangeFailed naming a server that did not load what was sent."""
        assert self._root is not None
        for server, workers in self._workers.items():
            for rank in range(workers):
                path = receipt_path(self._root, sent.update, server, rank)
                found = json.loads(path.read_text()) if path.is_file() else {"seconds": {}}
                seconds = found.pop("seconds")
                if found != asdict(sent):
                    said = f"it reports {found}" if found else "it reports nothing"
                    reason = (
                        f"worker {rank} acknowledged every bucket of version {sent.version}, but "
                        f"{said} in place of {asdict(sent)}; restart it"
                    )
                    raise control.fail(reason, server=server, phase="update", broken={server})
                for part, value in seconds.items():  # servers work at the same time
                    self.seconds[part] = max(self.seconds[part], value)
                path.unlink()

    def abandon(self) -> None:
        self._source.finish()
        for path in self._root.glob("receipt-*") if self._root is not None else ():
            path.unlink()

    def close(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
