"""A Hugging Face folder: its config.json, its tokenizer, and what must not be in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sip.config_model import Model
from megatron_sip.convert.families import SpecialIds, disagreements, model_of
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.model_folder import refuse_code

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
CARRIED = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a folder that brings no code.

    Raises: ValueError if there is none, or the folder holds code or pickles.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); name a Hugging Face folder"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it anew") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; copy it anew")
    refuse_code(folder)
    return found


def read_model(folder: Path) -> Model:
    """The [model] of a folder.

    Raises: ValueError if it is of no known family, or of one with settings not known here.
    """
    return model_of(read_description(folder), source=str(folder / "config.json"))


def find_tokenizer(folder: Path) -> Path:
    """tokenizer.json of a folder, or its tokenizer.model.

    Raises: ValueError if it has neither.
    """
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has none of {', '.join(TOKENIZERS)}; copy the tokenizer there")


def special_ids(folder: Path) -> SpecialIds:
    """Ids that config.json of a folder names, or else its generation_config.json."""
    found: dict[str, Any] = {}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            described = json.loads((folder / name).read_text(encoding="utf-8"))
            found |= {k: described.get(f"{k}_token_id") for k in ("bos", "eos", "pad")
                      if described.get(f"{k}_token_id") is not None}  # fmt: skip
    return SpecialIds(**found)


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and special ids of a folder, unchanged, into another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "generation_config.json").is_file():
        ids = {f"{k}_token_id": v for k, v in asdict(special_ids(source)).items() if v is not None}
        if ids:
            (target / "generation_config.json").write_text(json.dumps(ids, indent=1))


def agreement_problems(model: Model, folder: Path, tokenizer: Tokenizer | None) -> list[str]:
    """What of a folder is not as a recipe's [model] and tokenizer say, one message each.

    Raises: ValueError if the folder is no model that is known here.
    """
    theirs = read_model(folder)
    size = tokenizer.vocab_size if tokenizer else theirs.vocab_size or 0
    found = [
        f"{message} in {folder / 'config.json'}"
        for message in disagreements(model, theirs, tokenizer_size=size)
    ]
    if tokenizer:
        paths = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        if tokenizer.digest not in digests:
            theirs_shown = ", ".join(digest[:12] for digest in digests) or "no tokenizer"
            found.append(
                f"data.tokenizer has digest {tokenizer.digest[:12]}, but {folder} has "
                f"{theirs_shown}; use its tokenizer, and data made with it"
            )
    return found
