"""Distributed checkpoints: Megatron-Core's format plus our own JSON state and manifest.

Every function here is called by every rank; files are checked by rank 0 before anything is loaded
(`checkpoint_files`). All randomness is a function of (seed, step, sample), so the state holds no
generators.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sip import checkpoint_files as files
from megatron_sip.errors import RunFailed
from megatron_sip.model import Policy
from megatron_sip.optimizer import in_this_layout
from megatron_sip.parallel import Ranks, broadcast_object
from megatron_sip.publish import atomic_write
from megatron_sip.types import TrainState

SHARDING = {  # any TP, PP, DP and EP on load
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class SaveFailed(RunFailed):
    """A checkpoint could not be written; the one before is as it was."""


class Pending:
    """A save under way: this rank's file is being written, the checkpoint is not complete yet."""

    def __init__(
        self, folder: Path, writer: Any, seal: Callable[[Mapping[str, str]], None]
    ) -> None:
        self.folder, self._writer, self._seal = folder, writer, seal
        self._written = writer.start()

    @property
    def writing(self) -> bool:
        """Whether this rank's file is not on the disk yet."""
        return not self._written.done()

    def finish(self) -> None:
        """Wait for all ranks' files and complete the checkpoint; every rank calls it.

        Raises: SaveFailed if a rank could not write.
        """
        wait([self._written])
        with _told(self.folder):
            _on_rank_0(self._complete, self._gathered())

    def _gathered(self) -> Mapping[str, str]:
        """Digests of all ranks' files, which are written."""
        parts: list[Any] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, self._writer.digests)
        self._writer.finalize()
        return {name: digest for part in parts for name, digest in part.items()}

    def _complete(self, digests: Mapping[str, str]) -> None:
        if self._writer.failure is not None:
            raise self._writer.failure
        self._seal(digests)


def _on_rank_0(act: Callable[..., None], *arguments: Any) -> None:
    """Call it on rank 0; what the file system or a check says against it is raised on all ranks."""
    problem = None
    if dist.get_rank() == 0:
        try:
            act(*arguments)
        except (OSError, ValueError) as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem is not None:
        raise OSError(problem)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """SaveFailed in place of what Megatron-Core and the file system raise."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        reason = _reason(error) if isinstance(error, CheckpointException) else str(error)
        raise SaveFailed(
            f"checkpoint {folder} could not be written: {reason}; the one before is as it was: "
            "make room and go on with --resume"
        ) from error


def _reason(error: CheckpointException) -> str:
    """What a rank said; of a save only rank 0 knows it."""
    return next((str(failure[0]) for failure in error.failures.values()), "see rank 0")


def save(
    run_dir: Path,
    *,
    policy: Policy,
    optimizer: Any,
    scheduler: Any,
    state: TrainState,
    identity: dict[str, Any],
    asynchronous: bool = False,
) -> Pending:
    """Begin to write a checkpoint; every rank calls it.

    What is returned must be finished, by every rank, before the next one is saved; only then is
    the checkpoint complete and `latest` points to it.

    Args:   asynchronous: training goes on before it is finished: a copy is written, in host memory.
    Raises: SaveFailed on every rank if rank 0 cannot make the folder.
    """
    sharded = sharded_state(policy=policy, optimizer=optimizer, scheduler=scheduler)
    folder = files.step_folder(run_dir, state.step)
    latest = run_dir / "checkpoints" / "latest"
    return _begin(
        folder, sharded, identity=identity, state=state, latest=latest, changing=asynchronous
    )


def sharded_state(*, policy: Policy, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """What Megatron-Core saves of this rank; every rank calls it. Moments are copies."""
    policy.ddp.start_param_sync(force_sync=True)
    model = policy.module.sharded_state_dict()
    return {
        "model": model,
        "optimizer": optimizer.sharded_state_dict({"model": model}, metadata=SHARDING),
        "scheduler": scheduler.state_dict(),
    }


def save_weights(
    run_dir: Path,
    version: int,
    *,
    module: Any,
    identity: dict[str, Any],
    state: TrainState | None = None,
) -> None:
    """Write `module`, the policy's weights of version `version`, beside the checkpoints, once.

    Args:   state: of step 0, to make it a checkpoint: the optimizer holds nothing yet.
    Raises: SaveFailed if a rank cannot write.
    """
    folder = files.weights_folder(run_dir, version)
    if broadcast_object(files.is_complete(folder)):
        return
    sharded = {"model": module.sharded_state_dict()}
    _begin(folder, sharded, identity=identity, state=state).finish()


def _begin(
    folder: Path,
    sharded: dict[str, Any],
    *,
    identity: dict[str, Any],
    state: TrainState | None = None,
    latest: Path | None = None,
    changing: bool = False,
) -> Pending:
    """Begin to write a folder, which is sealed by its manifest and then named by `latest`."""
    from megatron.core import dist_checkpointing

    from megatron_sip.checkpoint_reading import check_contents
    from megatron_sip.checkpoint_writing import SaveStrategy

    def make() -> None:
        if folder.exists():  # half-written, or later than the checkpoint that was resumed
            files.remove(folder)
        folder.mkdir(parents=True)

    def seal(digests: Mapping[str, str]) -> None:
        if state is not None:
            text = json.dumps(dataclasses.asdict(state), indent=1)
            atomic_write(folder / "train_state.json", text.encode())
        check_contents(folder)
        files.write_manifest(folder, identity, digests=digests)
        if latest is not None:
            atomic_write(latest, folder.name.encode())

    strategy: Any = SaveStrategy(changing=changing)
    with _told(folder):
        _on_rank_0(make)
        dist_checkpointing.save(
            sharded, str(folder), strategy, async_sharded_save=True, content_metadata=SHARDING
        )
    return Pending(folder, strategy.writer, seal)


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
    state = _load(folder, {"model": module.sharded_state_dict()})
    module.load_state_dict(state["model"])


def _load(folder: Path, sharded: dict[str, Any]) -> Any:
    """Megatron-Core's load, which unpickles known classes alone."""
    from megatron.core import dist_checkpointing

    from megatron_sip.mcore_patches import guard_unpickling

    guard_unpickling()
    try:
        return dist_checkpointing.load(sharded, str(folder), strict="raise_unexpected")
    except CheckpointException as error:  # not an Exception: nobody else would catch it
        raise ValueError(f"{folder} cannot be loaded: {_reason(error)}") from None


def read_state(folder: Path) -> TrainState:
    """train_state.json of a verified checkpoint; what an older release did not write has defaults.

    Raises: ValueError naming what only another release knows, or what is missing.
    """
    path = folder / "train_state.json"
    found = json.loads(path.read_text())
    unknown = sorted(found.keys() - {field.name for field in dataclasses.fields(TrainState)})
    if unknown:
        raise ValueError(f"{path} holds {', '.join(unknown)}, which this release does not know; "
                         "go on with the release that wrote it")  # fmt: skip
    try:
        return TrainState(**found)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; name an older checkpoint") from None


def load(folder: Path, *, policy: Policy, optimizer: Any, scheduler: Any) -> None:
    """Load a verified checkpoint: weights, optimizer, schedule; resharded to this layout.

    That of step 0 is weights alone; optimizer and schedule must be new ones then.
    """
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
    state = _load(folder, sharded)
    policy.module.load_state_dict(state["model"])
    optimizer.load_state_dict(in_this_layout(state["optimizer"], optimizer))
    scheduler.load_state_dict(state["scheduler"])


def find_verified(
    path: Path, *, identity: dict[str, Any], ranks: Ranks, key: str = "checkpoint"
) -> Path:
    """The checkpoint folder at `path`, or the latest of a run directory; verified by rank 0.

    Raises: ValueError, on every rank, if there is none, or it is damaged or of another model.
    """
    from megatron_sip.checkpoint_reading import check_contents

    folder, problem = None, None
    if ranks.is_main:
        try:
            folder = files.find(path, key=key)
            files.verify(folder, identity)
            check_contents(folder)
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
    folder, problem = broadcast_object((folder, problem))
    if problem is not None:
        raise ValueError(problem)
    return folder
