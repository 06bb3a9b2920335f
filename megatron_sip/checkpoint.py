"""Distributed checkpoints: Megatron-Core's format plus our own JSON state and manifest.

Every function here is called by every rank; files are checked by rank 0 before anything is loaded
(`checkpoint_files`). All randomness is a function of (seed, step, sample), so the state holds no
generators.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sip import checkpoint_files as files
from megatron_sip.lifetime import children_shielded
from megatron_sip.model import Policy
from megatron_sip.parallel import Ranks, broadcast_object
from megatron_sip.publish import atomic_write
from megatron_sip.types import TrainState

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # any TP, PP, DP on load


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
    """Write one complete checkpoint, then point `latest` to it."""
    folder = files.step_folder(run_dir, state.step)
    policy.ddp.start_param_sync(force_sync=True)
    model_state = policy.module.sharded_state_dict()
    sharded = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict({"model": model_state}, metadata=SHARDING),
        "scheduler": scheduler.state_dict(),
    }
    _write(folder, sharded, identity=identity, ranks=ranks, state=state)
    if ranks.is_main:
        atomic_write(run_dir / "checkpoints" / "latest", folder.name.encode())
    dist.barrier()
    return folder


def save_weights(
    run_dir: Path,
    version: int,
    *,
    module: Any,
    identity: dict[str, Any],
    ranks: Ranks,
    state: TrainState | None = None,
) -> None:
    """Write `module`, the policy's weights of version `version`, beside the checkpoints, once.

    Args: state: of step 0, to make it a checkpoint: the optimizer holds nothing yet.
    """
    folder = files.weights_folder(run_dir, version)
    if broadcast_object(files.is_complete(folder)):
        return
    sharded = {"model": module.sharded_state_dict()}
    _write(folder, sharded, identity=identity, ranks=ranks, state=state)
    dist.barrier()


def _write(
    folder: Path,
    sharded: dict[str, Any],
    *,
    identity: dict[str, Any],
    ranks: Ranks,
    state: TrainState | None = None,
) -> None:
    from megatron.core import dist_checkpointing

    if ranks.is_main:
        if folder.exists():  # half-written, or later than the checkpoint that was resumed
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    dist.barrier()
    with children_shielded():
        dist_checkpointing.save(sharded, str(folder), content_metadata=SHARDING)
    dist.barrier()
    if ranks.is_main:
        if state is not None:
            text = json.dumps(dataclasses.asdict(state), indent=1)
            atomic_write(folder / "train_state.json", text.encode())
        files.write_manifest(folder, identity)


def load_weights(
    path: Path, *, module: Any, identity: dict[str, Any], ranks: Ranks, key: str = "checkpoint"
) -> None:
    """Load model weights alone into `module`, resharded to this layout.

    Args:   path: a checkpoint folder, or a run directory, whose latest is taken.
            key: of the recipe that names the path, for messages.
    Raises: ValueError if there is no checkpoint, or it is damaged or of another model.
    """
    _load_model(find_verified(path, identity=identity, ranks=ranks, key=key), module)


def _load_model(folder: Path, module: Any) -> None:
    from megatron.core import dist_checkpointing

    state: Any = dist_checkpointing.load(
        {"model": module.sharded_state_dict()}, str(folder), strict="raise_unexpected"
    )
    module.load_state_dict(state["model"])


def read_state(folder: Path) -> TrainState:
    """train_state.json of a verified checkpoint."""
    return TrainState(**json.loads((folder / "train_state.json").read_text()))


def load(folder: Path, *, policy: Policy, optimizer: Any, scheduler: Any) -> None:
    """Load a verified checkpoint: weights, optimizer, schedule; resharded to this layout.

    That of step 0 is weights alone; optimizer and schedule must be new ones then.
    """
    from megatron.core import dist_checkpointing

    if read_state(folder).step == 0:
        _load_model(folder, policy.module)
        optimizer.reload_model_params()
        return
    for part in optimizer.chained_optimizers:
        part._init_optimizer_states_with_dummy_values()  # Torch's Adam has none before a step
    model_state = policy.module.sharded_state_dict()
    sharded = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(
            {"model": model_state}, is_loading=True, metadata=SHARDING
        ),
        "scheduler": scheduler.state_dict(),
    }
    state: Any = dist_checkpointing.load(sharded, str(folder), strict="raise_unexpected")
    policy.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def find_verified(
    path: Path, *, identity: dict[str, Any], ranks: Ranks, key: str = "checkpoint"
) -> Path:
    """The checkpoint folder at `path`, or the latest of a run directory; verified by rank 0.

    Raises: ValueError, on every rank, if there is none, or it is damaged or of another model.
    """
    folder, problem = None, None
    if ranks.is_main:
        try:
            folder = files.find(path, key=key)
            files.verify(folder, identity)
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
    folder, problem = broadcast_object((folder, problem))
    if problem is not None:
        raise ValueError(problem)
    return folder
