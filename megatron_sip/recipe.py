"""A recipe file and its overrides -> a validated Config, or errors worth reading."""

from __future__ import annotations

import difflib
import itertools
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megatron_sip.config import Config


def _keys(annotation: Any) -> list[str]:
    """Keys of all sections inside a type annotation, nested ones included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        nested = [_keys(field.annotation) for field in annotation.model_fields.values()]
        return [*annotation.model_fields, *itertools.chain(*nested)]
    return [key for argument in get_args(annotation) for key in _keys(argument)]


def _remedy(location: Sequence[int | str]) -> str:
    """What to write instead of the unknown key at `location`."""
    *sections, unknown = map(str, location)
    field = Config.model_fields.get(sections[0]) if sections else None
    known = sorted(set(_keys(field.annotation) if field else Config.model_fields))
    near = difflib.get_close_matches(unknown, known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"keys there: {', '.join(known)}"


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, rule, remedy."""
    location = error["loc"]
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_remedy(location)}"
    if error["type"] == "missing":
        return f"{key}: required and missing"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        tag = context["discriminator"].strip("'")
        return f"{key}.{tag} is {context['tag']!r}, must be one of {context['expected_tags']}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{key} is {error['input']!r}: {error['msg']}"


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`; the value is TOML, or a bare string."""
    path, found, text = override.partition("=")
    if not found or not path.strip():
        raise ValueError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = path.strip().split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {override!r}: {name} is not a section")
    tree[key] = value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of a dumped recipe; an absent section and one of None are the same."""
    pairs: Any = ()
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, (list, tuple)):
        pairs = enumerate(tree)
    elif tree is not None:
        return {prefix: tree}
    found = {}
    for key, value in pairs:
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read and validate a recipe.

    Raises: ValueError naming each wrong key, its value, the rule and the remedy.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file; the recipes are in configs/") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _set(tree, override)
    try:
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = [_explain(dict(e)) for e in error.errors(include_url=False)]
        raise ValueError(f"{path}:\n  " + "\n  ".join(lines)) from None
