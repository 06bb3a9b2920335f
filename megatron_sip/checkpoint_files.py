"""Folders and manifests of checkpoints: found, verified, kept or removed. No tensors here.

    checkpoints/step_00000100/            one distributed checkpoint
        manifest.json                     digest of every other file, model, tokenizer; written last
        train_state.json
    checkpoints/weights_00000000/         weights alone, of one policy version: reference, and the
                                          start, which train_state.json makes a checkpoint of step 0
    checkpoints/latest                    name of the newest complete one, replaced atomically

Megatron-Core unpickles metadata while loading, so nothing is loaded before its files match a
manifest of ours: a folder without one is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_sip.config import Model
from megatron_sip.publish import atomic_write, sync

SCHEMA_VERSION = 1
_STEP = re.compile(r"step_(\d{8})")
_WEIGHTS = re.compile(r"weights_(\d{8})")
SHAPE_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "rotary_base", "norm_epsilon", "share_embeddings_and_output_weights", "family", "rope_scaling",
    "experts",
)  # fmt: skip
ABSENT = {"family": "llama", "rope_scaling": None, "experts": None, "kv_channels": None}
"""What older manifests mean by fields that they lack."""


def model_identity(model: Model, *, vocab_size: int, tokenizer_digest: str) -> dict[str, Any]:
    """What two runs must share for one to load the other's weights."""
    fields = model.model_dump(mode="json", include=set(SHAPE_FIELDS))
    usual = model.head_dim * model.num_attention_heads == model.hidden_size
    return fields | {
        "kv_channels": None if usual else model.head_dim,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_digest,
    }


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def weights_folder(run_dir: Path, version: int) -> Path:
    return run_dir / "checkpoints" / f"weights_{version:08d}"


def is_complete(folder: Path) -> bool:
    """Whether saving it came to its end."""
    return (folder / "manifest.json").is_file()


def write_manifest(
    folder: Path, identity: dict[str, Any], *, digests: Mapping[str, str] | None = None
) -> None:
    """Seal a checkpoint: from now on it is complete, and any change of it is found.

    Args:   digests: by name, of files that were read back from the disk already.
    """
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    known = digests or {}
    for name, path in files.items():
        if name not in known:
            sync(path)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": identity,
        "files": {name: known.get(name) or digest_of(path) for name, path in files.items()},
    }
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def find(path: Path, *, key: str = "checkpoint") -> Path:
    """Checkpoint folder for `path`: itself, or the latest of a run directory.

    Args:   key: of the recipe that names the path, for the message.

    Raises: ValueError if there is none.
    """
    if is_complete(path):
        return path
    latest = path / "checkpoints" / "latest"
    if latest.is_file():
        return path / "checkpoints" / latest.read_text().strip()
    if _is_megatrons(path):
        raise ValueError(
            f"{key} {path}: a Megatron checkpoint without a manifest of ours (manifest.json) is "
            "not loaded, since that would unpickle what it holds; export it to a Hugging Face "
            "folder of safetensors where you trust it, and give that, or convert it with "
            "tools/convert_checkpoint.py hf-to-megatron"
        )
    raise ValueError(
        f"{key} {path}: neither a checkpoint of ours (manifest.json) nor a run directory with "
        "checkpoints/latest; run the recipe that makes it first"
    )


def _is_megatrons(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of Megatron-LM, old or distributed."""
    names = (".metadata", "common.pt", "metadata.json", "latest_checkpointed_iteration.txt")
    patterns = ("*.distcp", "iter_*", "mp_rank_*", "model_optim_rng.pt")
    return any((path / name).exists() for name in names) or any(
        any(path.glob(pattern)) for pattern in patterns
    )


def find_last(run_dir: Path) -> Path:
    """Where `--resume` goes on: the latest checkpoint, or the start before there is any.

    Raises: ValueError if the run did not come as far as its first step.
    """
    if (run_dir / "checkpoints" / "latest").is_file():
        return find(run_dir)
    start = weights_folder(run_dir, 0)
    if is_complete(start) and (start / "train_state.json").is_file():
        return start
    raise ValueError(
        f"--resume: {run_dir} has no checkpoint yet; remove the folder and start without --resume"
    )


def check_identity(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Whether a checkpoint is of this run's model and tokenizer; its manifest.

    Raises: ValueError if the manifest is unreadable, or naming the field that differs.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder / 'manifest.json'} cannot be read ({error}); the checkpoint is incomplete or "
            "damaged: name an older one"
        ) from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}: schema {manifest.get('schema_version')}, this version reads "
            f"{SCHEMA_VERSION}"
        )
    for field, wanted in identity.items():
        found = manifest["model"].get(field, ABSENT.get(field))
        if found != wanted:
            raise ValueError(
                f"{folder} was made with {field} = {found}, this recipe has {wanted}; use the same"
            )
    return manifest


def verify(folder: Path, identity: dict[str, Any]) -> None:
    """Check a checkpoint, every byte of it, against its manifest and this run's model.

    Raises: ValueError naming the file or field that differs.
    """
    manifest = check_identity(folder, identity)
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    odd = present ^ {*manifest["files"], "manifest.json"}
    if odd:
        raise ValueError(f"{folder}: files missing or unknown to its manifest: {sorted(odd)}")
    for name, digest in manifest["files"].items():
        if digest_of(folder / name) != digest:
            raise ValueError(
                f"{folder / name} differs from its manifest; the checkpoint is damaged: name an "
                "older one"
            )


def prune(run_dir: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Remove old checkpoints of steps: all but the last ones and each multiple of `keep_every`.

    The one that `latest` names always stays; so do the weights of the start and of each reference
    that a checkpoint which stays was made with.
    """
    root = run_dir / "checkpoints"
    steps = sorted(_steps(root))
    latest = find(run_dir).name
    for step in steps[:-keep_last]:
        folder = step_folder(run_dir, step)
        if folder.name == latest or (keep_every and step % keep_every == 0):
            continue
        remove(folder)
    needed = {0, *(_reference_version(step_folder(run_dir, step)) for step in _steps(root))}
    for version in _numbers(root, _WEIGHTS):
        if version not in needed:
            remove(weights_folder(run_dir, version))


def remove(folder: Path) -> None:
    """Remove a folder so that at no instant it is half there and taken for complete."""
    (folder / "manifest.json").unlink(missing_ok=True)  # half removed is not complete
    shutil.rmtree(folder)


def _reference_version(folder: Path) -> int:
    """Policy version of the reference that a checkpoint was made with, -1 for none."""
    return json.loads((folder / "train_state.json").read_text())["reference_version"]


def remove_incomplete(run_dir: Path) -> None:
    """Remove what a run that was killed while it saved has left."""
    for folder in (run_dir / "checkpoints").iterdir():
        if folder.is_dir() and not is_complete(folder):
            remove(folder)


def steps_saved(run_dir: Path) -> tuple[int, int]:
    """The oldest and the newest step that there is a complete checkpoint of; 0 and 0 for none."""
    steps = _steps(run_dir / "checkpoints") or [0]
    return min(steps), max(steps)


def checkpoint_bytes(run_dir: Path) -> int:
    """Size of the newest complete checkpoint; 0 before there is one."""
    newest = step_folder(run_dir, steps_saved(run_dir)[1])
    return sum(p.stat().st_size for p in newest.glob("*")) if newest.is_dir() else 0


def _steps(root: Path) -> list[int]:
    return _numbers(root, _STEP)


def _numbers(root: Path, pattern: re.Pattern[str]) -> list[int]:
    """Numbers in the names of complete folders of one kind."""
    return [
        int(m[1]) for p in root.iterdir() if (m := pattern.fullmatch(p.name)) and is_complete(p)
    ]


def digest_of(path: Path, *, from_disk: bool = False) -> str:
    """xxh3_128 of a file's bytes.

    Args: from_disk: of a file that was just synced: drop what memory holds of it, and read it.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if from_disk and sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
