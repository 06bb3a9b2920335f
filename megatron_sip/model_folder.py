"""Model folders that others made: complete, and nothing in them that would be run. No torch.

Refused are Python files, `auto_map` and `trust_remote_code` in any JSON file, and weights that are
pickles. Weights are safetensors, tokenizers are data, chat templates run in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODE = (".py", ".pyc", ".pyo", ".so", ".pyd", ".ipynb")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
KEYS = ("auto_map", "trust_remote_code")


def check_model_folder(folder: Path) -> None:
    """Whether a model folder has a tokenizer and a config.json, and holds no code.

    Raises: ValueError naming folder and remedy.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; give a Hugging Face folder (make quickstart makes "
                "the quickstart's judge with tools/convert_checkpoint.py gguf-to-hf)"
            )
    refuse_code(folder)
    read_config(folder)


def refuse_code(folder: Path) -> None:
    """Raises: ValueError naming what in a model folder would be run, or unpickled."""
    files = sorted(p for p in folder.rglob("*") if not p.is_dir())
    code = [str(p.relative_to(folder)) for p in files if p.suffix.lower() in CODE]
    code += [f"{key} in {p.name}" for p in files if p.suffix == ".json" for key in _keys(p)]
    if code:
        raise ValueError(
            f"{folder} brings code ({', '.join(code)}), which is never run; remove it, or take a "
            "model that needs none"
        )
    pickles = [str(p.relative_to(folder)) for p in files if p.suffix.lower() in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds pickles ({', '.join(pickles)}), which are never read; remove them, "
            "and if they are its only weights, convert them to safetensors where you trust them"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises: ValueError if it is no JSON object."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it anew") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; copy it anew")
    return found


def check_weights(folder: Path) -> None:
    """Whether all safetensors files are there; vLLM would find out after its slow start.

    Raises: ValueError if one is missing, or named outside of the folder.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    outside = sorted(n for n in names if Path(n).name != n or not n.endswith(".safetensors"))
    if outside:
        raise ValueError(
            f"{index} names {', '.join(outside)}; weights are .safetensors files of the folder"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} lacks weights: {', '.join(missing)}; copy them there")


def _keys(path: Path) -> Iterator[str]:
    """Which of KEYS a JSON file holds, at whatever depth; none of a file that is not JSON."""
    found: set[str] = set()

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.update(key for key, value in pairs if key in KEYS and value)
        return dict(pairs)

    try:
        json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=look)
    except (OSError, ValueError, RecursionError):
        return
    yield from sorted(found)
