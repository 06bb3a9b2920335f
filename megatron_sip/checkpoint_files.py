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
import re
import shutil
from pathlib import Path
from typing import Any

import xxhash

from megatron_sip.config import Model
from megatron_sip.publish import atomic_write

SCHEMA_VERSION = 1
_STEP = re.compile(r"step_(\d{8})")
_WEIGHTS = re.compile(r"weights_(\d{8})")
SHAPE_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "rotary_base", "norm_epsilon", "share_embeddings_and_output_weights",
)  # fmt: skip


def model_identity(model: Model, *, vocab_size: int, tokenizer_digest: str) -> dict[str, Any]:
    """What two runs must share for one to load the other's weights."""
    fields = {name: getattr(model, name) for name in SHAPE_FIELDS}
    return fields | {"vocab_size": vocab_size, "tokenizer": tokenizer_digest}


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def weights_folder(run_dir: Path, version: int) -> Path:
    return run_dir / "checkpoints" / f"weights_{version:08d}"


def is_complete(folder: Path) -> bool:
    """Whether saving it came to its end."""
    return (folder / "manifest.json").is_file()


def write_manifest(folder: Path, identity: dict[str, Any]) -> None:
    """Seal a checkpoint: from now on it is complete, and any change of it is found."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": identity,
        "files": {str(p.relative_to(folder)): _digest(p) for p in files},
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
    raise ValueError(
        f"{key} {path}: neither a checkpoint of ours (manifest.json) nor a run directory with "
        "checkpoints/latest; run the recipe that makes it first"
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
        found = manifest["model"].get(field)
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
        if _digest(folder / name) != digest:
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
        _remove(folder)
    needed = {0, *(_reference_version(step_folder(run_dir, step)) for step in _steps(root))}
    for version in _numbers(root, _WEIGHTS):
        if version not in needed:
            _remove(weights_folder(run_dir, version))


def _remove(folder: Path) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)  # half removed is not complete
    shutil.rmtree(folder)


def _reference_version(folder: Path) -> int:
    """Policy version of the reference that a checkpoint was made with, -1 for none."""
    return json.loads((folder / "train_state.json").read_text())["reference_version"]


def remove_incomplete(run_dir: Path) -> None:
    """Remove what a run that was killed while it saved has left."""
    for folder in (run_dir / "checkpoints").iterdir():
        if folder.is_dir() and not is_complete(folder):
            shutil.rmtree(folder)


def _steps(root: Path) -> list[int]:
    return _numbers(root, _STEP)


def _numbers(root: Path, pattern: re.Pattern[str]) -> list[int]:
    """Numbers in the names of complete folders of one kind."""
    return [
        int(m[1]) for p in root.iterdir() if (m := pattern.fullmatch(p.name)) and is_complete(p)
    ]


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
