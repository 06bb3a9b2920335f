"""GGUF file -> Hugging Face folder that vLLM serves: config, safetensors, tokenizer, template.

transformers reads GGUF and de-quantises it; its `save_pretrained` refuses afterwards because the
configuration still names the quantisation, so the folder is written here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path

import torch


def locate(gguf: str) -> Path:
    """The file itself, or the one .gguf inside an installed package for "package:NAME".

    Raises: ValueError if there is none.
    """
    if not gguf.startswith("package:"):
        path = Path(gguf)
        if not path.is_file():
            raise ValueError(f"--gguf {gguf}: no such file")
        return path
    name = gguf.removeprefix("package:")
    spec = importlib.util.find_spec(name)  # finds the folder; runs nothing of the package
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise ValueError(
            f"--gguf {gguf}: package {name} holds {len(files)} .gguf files, one is needed; "
            f"is it installed?"
        )
    return files[0]


def gguf_to_huggingface(gguf: Path, folder: Path) -> int:
    """Write `folder` in one piece; it must not exist.

    Returns: number of parameters.
    Raises:  ValueError if `folder` exists or the architecture is not Llama.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder.exists():
        raise ValueError(f"--hf {folder} exists; remove it or choose another folder")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = model.config.to_dict()
    if config["model_type"] != "llama":
        raise ValueError(f"{gguf}: model type {config['model_type']}, only llama is converted")
    tied = config["tie_word_embeddings"]
    state = {n: t.contiguous() for n, t in model.state_dict().items()
             if not (tied and n == "lm_head.weight")}  # fmt: skip
    keep = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    keep |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        temporary = Path(name) / folder.name
        temporary.mkdir()
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(keep, indent=1, default=str))
        os.rename(temporary, folder)
    return sum(t.numel() for t in state.values())
