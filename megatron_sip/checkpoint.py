"""Distributed checkpoints: Megatron-Core's format plus our own JSON state and manifest.

    checkpoints/step_00000100/            one distributed checkpoint
        manifest.json                     digest of every other file, model, tokenizer; written last
        train_state.json
    checkpoints/latest                    name of the newest complete one, replaced atomically

Megatron-Core unpickles metadata while loading, so nothing is loaded before its files match a
manifest of ours: a folder without one is refused.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from megatron_sip.config import Model
from megatron_sip.model import Policy
from megatron_sip.parallel import Ranks, broadcast_object
from megatron_sip.run_dir import atomic_write
from megatron_sip.types import TrainState

SCHEMA_VERSION = 1
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # any TP, PP, DP on load
SHAPE_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "rotary_base", "norm_epsilon", "share_embeddings_and_output_weights",
)  # fmt: skip


def model_identity(model: Model, *, vocab_size: int, tokenizer_digest: str) -> dict[str, Any]:
    """What two runs must share for one to load the other's weights."""
    fields = {name: getattr(model, name) for name in SHAPE_FIELDS}
    return fields | {"vocab_size": vocab_size, "tokenizer": tokenizer_digest}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save(
    run_dir: Path,
    *,
    policy: Policy,
    optimizer: Any,
    scheduler: Any,
    state: TrainState,
    identity: dict[str, Any],
    ranks: Ranks,
) -> Path:
    """Write one complete checkpoint, then point `latest` to it. Every rank calls it."""
    from megatron.core import dist_checkpointing

    root = run_dir / "checkpoints"
    folder = root / f"step_{state.step:08d}"
    if ranks.is_main:
        folder.mkdir(parents=True)
    dist.barrier()
    policy.ddp.start_param_sync(force_sync=True)
    model_state = policy.module.sharded_state_dict()
    sharded = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict({"model": model_state}, metadata=SHARDING),
        "scheduler": scheduler.state_dict(),
    }
    dist_checkpointing.save(sharded, str(folder), content_metadata=SHARDING)
    dist.barrier()
    if ranks.is_main:
        atomic_write(
            folder / "train_state.json", json.dumps(dataclasses.asdict(state), indent=1).encode()
        )
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "model": identity,
            "files": {str(p.relative_to(folder)): _digest(p) for p in files},
        }
        atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        atomic_write(root / "latest", folder.name.encode())
    dist.barrier()
    return folder


def find(path: Path) -> Path:
    """Checkpoint folder for `path`: itself, or the latest of a run directory.

    Raises: ValueError if there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    latest = path / "checkpoints" / "latest"
    if latest.is_file():
        return path / "checkpoints" / latest.read_text().strip()
    raise ValueError(
        f"model.init.path {path}: neither a checkpoint of ours (manifest.json) nor a run directory "
        "with checkpoints/latest; run the recipe that makes it first"
    )


def verify(folder: Path, identity: dict[str, Any]) -> None:
    """Check a checkpoint against its manifest and this run's model.

    Raises: ValueError naming the file or field that differs.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}: schema {manifest.get('schema_version')}, this version reads "
            f"{SCHEMA_VERSION}"
        )
    for field, wanted in identity.items():
        found = manifest["model"].get(field)
        if found != wanted:
            raise ValueError(
                f"{folder} was made with {field} = {found}, this recipe has {wanted}; use the same"
            )
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    odd = present ^ {*manifest["files"], "manifest.json"}
    if odd:
        raise ValueError(f"{folder}: files missing or unknown to its manifest: {sorted(odd)}")
    for name, digest in manifest["files"].items():
        if _digest(folder / name) != digest:
            raise ValueError(
                f"{folder / name} differs from its manifest; the checkpoint is damaged"
            )


def load_weights(path: Path, *, module: Any, identity: dict[str, Any], ranks: Ranks) -> Path:
    """Load model weights alone into `module`, resharded to this layout. Every rank calls it.

    Raises: ValueError if there is no checkpoint, or it is damaged or of another model.
    """
    from megatron.core import dist_checkpointing

    folder, problem = None, None
    if ranks.is_main:
        try:
            folder = find(path)
            verify(folder, identity)
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
    folder, problem = broadcast_object((folder, problem))
    if problem is not None:
        raise ValueError(problem)
    state: Any = dist_checkpointing.load(
        {"model": module.sharded_state_dict()}, str(folder), strict="raise_unexpected"
    )
    module.load_state_dict(state["model"])
    return folder
