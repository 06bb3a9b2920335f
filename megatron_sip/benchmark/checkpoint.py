"""Checkpoints: seconds to save and load, seconds that training waits, bytes on the disk.

Models of 135 M, 360 M and 1.1 B parameters in fp32 with Adam's two moments, on one rank; those that
do not fit into memory are left out, by name. Of all: the weights alone, as a run keeps those of its
start policy. Synchronous: until the checkpoint is complete.
Asynchronous: what training waits for, the copy at the save and the completion after the writing.
All is read back from the disk and compared with what was written. The plain way is Megatron-Core's
own save, which reads nothing back.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from megatron_sip import checkpoint, checkpoint_files
from megatron_sip.benchmark.measure import one_rank
from megatron_sip.config import Optimizer, Parallel
from megatron_sip.config_model import Model
from megatron_sip.convert.names import name_table
from megatron_sip.disk import folder_bytes
from megatron_sip.model import build_module, transformer_config, wrap_data_parallel
from megatron_sip.optimizer import build_optimizer, build_scheduler
from megatron_sip.parallel import Ranks
from megatron_sip.platform import Platform
from megatron_sip.types import TrainState

SHAPES = {  # of SmolLM2-135M and -360M, and of TinyLlama
    "135m": (49_152, Model(
        num_layers=30, hidden_size=576, ffn_hidden_size=1_536, num_attention_heads=9,
        num_query_groups=3, max_sequence_length=2_048, share_embeddings_and_output_weights=True)),
    "360m": (49_152, Model(
        num_layers=32, hidden_size=960, ffn_hidden_size=2_560, num_attention_heads=15,
        num_query_groups=5, max_sequence_length=2_048, share_embeddings_and_output_weights=True)),
    "1100m": (32_000, Model(
        num_layers=22, hidden_size=2_048, ffn_hidden_size=5_632, num_attention_heads=32,
        num_query_groups=4, max_sequence_length=2_048)),
}  # fmt: skip
MEMORY = 40  # bytes a parameter: weights, gradients, moments, their copies in a save, and room
REPETITIONS = 3
ALONE = Ranks(
    rank=0, world_size=1, tp_rank=0, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1, ep_size=1
)


def run() -> dict[str, Any]:
    """The benchmark; some minutes, and 40 GiB of memory and of disk for the largest model.

    Returns: ratios by model: `blocked`, seconds that an asynchronous save stops the training over
             those of a synchronous one; `save`, synchronous over Megatron-Core's own.
    """
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with one_rank() as platform:
        for name, (vocabulary, model) in SHAPES.items():
            shapes = [s for entry in name_table(model, vocab_size=vocabulary) for s in entry.shapes]
            number = sum(map(math.prod, shapes))
            results[f"{name}_parameters"] = number
            alone = _weights_alone(vocabulary, model, platform)
            results |= {f"{name}_weights_{key}": value for key, value in alone.items()}
            free = psutil.virtual_memory().available
            if number * MEMORY > free:
                results[f"{name}_left_out"] = f"needs {number * MEMORY / 2**30:.0f} GiB of memory"
                continue
            found = _measure(vocabulary, model, platform)
            results |= {f"{name}_{key}": value for key, value in found.items()}
            blocked = median(found["blocked_s"])
            ratios[f"blocked_{name}"] = blocked / median(found["save_s"])
            ratios[f"save_{name}"] = median(found["save_s"]) / median(found["plain_save_s"])
    settings = {
        "dtype": "float32",
        "repetitions": REPETITIONS,
        "threads": torch.get_num_threads(),
        "plain": "megatron.core.dist_checkpointing.save, synchronous",
    }
    return {"name": "checkpoint", "settings": settings, "results": results, "ratios": ratios}


def _weights_alone(vocabulary: int, model: Model, platform: Platform) -> dict[str, Any]:
    """Seconds to save and load weights without an optimizer's state, and their bytes."""
    module = _module(vocabulary, model, platform).requires_grad_(False)
    identity, found = {"layers": 1}, {"save_s": [], "load_s": []}
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=".") as folder:
        for version in range(REPETITIONS):
            of_version = checkpoint_files.weights_folder(Path(folder), version)

            def save(version: int = version) -> None:
                checkpoint.save_weights(Path(folder), version, module=module, identity=identity)

            def load(path: Path = of_version) -> None:
                checkpoint.load_weights(path, module=module, identity=identity, ranks=ALONE)

            found["save_s"].append(_seconds(save))
            found["load_s"].append(_seconds(load))
            size = folder_bytes(of_version)
            shutil.rmtree(of_version)
    return {**found, "bytes": size}


def _module(vocabulary: int, model: Model, platform: Platform) -> Any:
    config = transformer_config(model, Parallel(world_size=1), platform)
    module = build_module(config, model, platform, vocab_size=vocabulary)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.02)
    return module


def _measure(vocabulary: int, model: Model, platform: Platform) -> dict[str, Any]:
    """Seconds of each repetition, and bytes."""
    module = _module(vocabulary, model, platform)
    settings = Optimizer(lr=1e-3)
    policy = wrap_data_parallel(module.config, module, settings, platform)
    optimizer = build_optimizer(policy, settings, platform)
    for part in optimizer.chained_optimizers:
        part._init_optimizer_states_with_dummy_values()
    parts = {
        "policy": policy,
        "optimizer": optimizer,
        "scheduler": build_scheduler(optimizer, settings, steps=10),
    }
    names = (
        "plain_save_s",
        "save_s",
        "blocked_s",
        "copy_s",
        "written_after_s",
        "load_s",
        "verify_s",
    )
    found: dict[str, list[float]] = {name: [] for name in names}
    for step in range(1, REPETITIONS + 1):
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=".") as folder:
            for name, seconds in _once(Path(folder), parts, step).items():
                found[name].append(seconds)
            size = folder_bytes(checkpoint_files.step_folder(Path(folder), step))
    return {**found, "bytes": size, "bytes_a_parameter": size / sum(
        p.numel() for p in module.parameters())}  # fmt: skip


def _once(run_dir: Path, parts: dict[str, Any], step: int) -> dict[str, float]:
    """Seconds of one save of each kind, and of loading it."""
    state, identity = TrainState(step, 0, 0, {}, {}), {"layers": 1}

    def save(*, asynchronous: bool) -> checkpoint.Pending:
        return checkpoint.save(
            run_dir, **parts, state=state, identity=identity, asynchronous=asynchronous
        )

    seconds = {
        "plain_save_s": _seconds(lambda: _plain_save(run_dir / "plain", parts)),
        "save_s": _seconds(lambda: save(asynchronous=False).finish()),
    }
    began = time.perf_counter()
    pending = save(asynchronous=True)
    seconds["copy_s"] = time.perf_counter() - began
    while pending.writing:
        time.sleep(0.01)
    seconds["written_after_s"] = time.perf_counter() - began
    seconds["blocked_s"] = seconds["copy_s"] + _seconds(pending.finish)
    seconds["verify_s"] = _seconds(lambda: checkpoint_files.verify(pending.folder, identity))
    seconds["load_s"] = _seconds(lambda: checkpoint.load(pending.folder, **parts))
    return seconds


def _plain_save(folder: Path, parts: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir()
    sharded = checkpoint.sharded_state(**parts)
    dist_checkpointing.save(sharded, str(folder), content_metadata=checkpoint.SHARDING)
    shutil.rmtree(folder)


def _seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
