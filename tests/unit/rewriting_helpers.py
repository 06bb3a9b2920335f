"""A recipe with data and a scripted rewriter, for tests of the offline pass."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from data_helpers import write_dataset
from judge_helpers import SPECIAL, make_model_folder
from test_config import SIP

from megatron_sip.config import Config
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.recipe import load_config

WORDS = ["the", "world", "of", "words", "goes", "on", "and", "Yes", "No"]
NUM_DOCUMENTS = 24


def make_recipe(folder: Path, url: str, **changes: Any) -> Path:
    """FOLDER/recipe.toml with its datasets. Args: changes: section__key=value."""
    model = make_model_folder(folder / "judge")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0]}))
    tokenizer = Tokenizer.load(model / "tokenizer.json")
    if not (folder / "data.idx").exists():
        generator = np.random.default_rng(1)
        documents = [
            [*tokenizer.encode(" ".join(generator.choice(WORDS, 80))), tokenizer.eod]
            for _ in range(NUM_DOCUMENTS)
        ]
        write_dataset(
            folder / "data", documents, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod,
            tokenizer_digest=tokenizer.digest, min_tokens=24,
        ).close()  # fmt: skip
    tree = tomllib.loads(SIP)
    data = {split: str(folder / "data") for split in ("train", "validation", "test")}
    sizes = {"prefix_tokens": 32, "min_prefix_tokens": 16, "suffix_tokens": 8}
    tree["data"] |= data | sizes | {"tokenizer": str(model / "tokenizer.json")}
    tree["servers"]["judge"] |= {"url": url, "tokenizer": str(model)}
    tree["judge"]["cache_dir"] = str(folder / "cache")
    tree["curriculum"]["sources"] = ["suffix", "rewrite", "rollout"]
    tree["rewriter"] = {
        "server": "judge", "prompt": "rewrite_v2", "max_tokens": 32, "timeout_s": 20.0,
        "concurrency": 4,
    }  # fmt: skip
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def recipe(folder: Path, url: str, **changes: Any) -> Config:
    """As `make_recipe`, loaded."""
    return load_config(make_recipe(folder, url, **changes))


def reply_to(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a rewriter says: a function of the prompt alone; one in eight refuses."""
    if "prompt" not in body:
        return {}
    digest = hashlib.blake2b(repr(body["prompt"]).encode()).digest()
    if digest[0] < 32:
        text = "I'm sorry, but I cannot assist with that."
    else:
        text = "the " + " ".join(WORDS[b % len(WORDS)] for b in digest[:16])
    return {"choices": [{"text": text, "finish_reason": "stop"}]}
