"""What a server serves: where it listens, how its model reads text, which model it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.serving.client import Endpoint

CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class ServedModel:
    """A server together with the identity and tokenizer of the model that it serves."""

    endpoint: Endpoint
    tokenizer: JudgeTokenizer | None  # None: it takes text alone
    model_digest: str  # of the weights where we have them, else of what is known of the model
    prompt_price: float = 0.0  # of 10^6 prompt tokens
    completion_price: float = 0.0  # of 10^6 tokens that it writes


def folder_digest(folder: Path) -> str:
    """Digest of configuration, tokenizer and weights of a model folder; reads every byte.

    Raises: ValueError if the folder holds none of them.
    """
    names = [p for pattern in ("*.json", "*.safetensors") for p in folder.glob(pattern)]
    if not names:
        raise ValueError(f"{folder} holds no model; give a Hugging Face folder")
    digest = xxhash.xxh3_128()
    for path in sorted(names):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
