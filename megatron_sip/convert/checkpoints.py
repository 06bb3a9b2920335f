"""Hugging Face folder -> a checkpoint of ours, and back. One process; tensors one at a time.

MEGATRON/model.toml                       the recipe's [model] for it
MEGATRON/tokenizer/                       the folder's tokenizer, for data.tokenizer
MEGATRON/checkpoints/weights_00000000/    the weights; loaded in any TP and PP
MEGATRON/checkpoints/latest
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import tomli_w
import torch

from megatron_sip import checkpoint, checkpoint_files, parallel
from megatron_sip.config import Parallel, PlatformConfig
from megatron_sip.config_model import Model
from megatron_sip.convert.families import SpecialIds, describe
from megatron_sip.convert.hf_folder import (
    carry_tokenizer,
    find_tokenizer,
    read_model,
    special_ids,
)
from megatron_sip.convert.load import load_folder
from megatron_sip.convert.names import name_table
from megatron_sip.convert.stored import stored_dtype, stored_tensors
from megatron_sip.convert.tensor_folder import TensorFolder, TensorInfo, write_tensors
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.model import build_module, transformer_config
from megatron_sip.platform import Platform, cpu
from megatron_sip.publish import atomic_write, sync
from megatron_sip.serving.ports import free_port

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[str], None]


def huggingface_to_megatron(
    hf: Path, megatron: Path, *, dtype: str | None, progress: Progress
) -> int:
    """Write the folder `megatron`, whole or not at all.

    Args:    dtype: of the weights; None: fp32, or bf16 where the folder is bf16 throughout.
    Returns: number of parameters.
    Raises:  ValueError naming what of the folder is missing, unknown or not known here.
    """
    model = read_model(hf)
    tokenizer = Tokenizer.load(find_tokenizer(hf))
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{hf}: the tokenizer has {tokenizer.vocab_size} pieces, but config.json's vocab_size "
            f"is {model.vocab_size}; take the tokenizer of this model"
        )
    found = {info.dtype for info in TensorFolder(hf).tensors.values()}
    kept = torch.bfloat16 if found == {torch.bfloat16} else torch.float32
    wanted = kept if dtype is None else DTYPES[dtype]
    identity = checkpoint_files.model_identity(
        model, vocab_size=model.vocab_size, tokenizer_digest=tokenizer.digest
    )
    with new_folder(megatron) as folder, one_process(wanted) as platform:
        progress(f"reading {hf}: {model.family}, {model.num_layers} layers")
        config = transformer_config(model, Parallel(world_size=1), platform)
        module = build_module(config, model, platform, vocab_size=model.vocab_size)
        module = module.to(wanted).requires_grad_(False)
        load_folder(hf, module, model, vocab_size=model.vocab_size)
        progress("writing the checkpoint")
        checkpoint.save_weights(folder, 0, module=module, identity=identity)
        atomic_write(folder / "checkpoints" / "latest", b"weights_00000000")
        carry_tokenizer(hf, folder / "tokenizer")
        (folder / "model.toml").write_text(
            recipe_section(model, tokenizer_size=tokenizer.vocab_size)
        )
        return sum(p.numel() for p in module.parameters())


def megatron_to_huggingface(
    megatron: Path, hf: Path, *, dtype: str | None, tokenizer: Path | None, progress: Progress
) -> int:
    """Write the folder `hf`, whole or not at all.

    Args:    megatron: a run directory, one of its checkpoints, or what is written above.
             dtype: of the weights; None: the checkpoint's own.
             tokenizer: its file; None: the one that the checkpoint's recipe names.
    Returns: number of parameters.
    Raises:  ValueError if the checkpoint is not found, damaged or of another tokenizer.
    """
    source = checkpoint_files.find(megatron, key="--megatron")
    model, path = read_recipe(source, tokenizer)
    loaded = Tokenizer.load(path)
    size = model.vocabulary(loaded.vocab_size)
    identity = checkpoint_files.model_identity(
        model, vocab_size=size, tokenizer_digest=loaded.digest
    )
    progress(f"verifying {source}")
    checkpoint_files.verify(source, identity)
    saved = stored_dtype(source)
    wanted = saved if dtype is None else DTYPES[dtype]
    infos = [TensorInfo(name, wanted, shape)
             for entry in name_table(model, vocab_size=size)
             for name, shape in zip(entry.names, entry.shapes, strict=True)]  # fmt: skip
    with new_folder(hf) as folder, one_process(saved) as platform:
        progress(f"writing {len(infos)} tensors")
        write_tensors(folder, infos, stored_tensors(source, model, platform, vocab_size=size))
        write_tokenizer(path, folder)
        write_description(folder, model, vocab_size=size, eos=loaded.eod, dtype=wanted)
    return sum(math.prod(info.shape) for info in infos)


def recipe_section(model: Model, *, tokenizer_size: int) -> str:
    """[model] of a recipe, as TOML."""
    if model.vocab_size == tokenizer_size:
        model = model.model_copy(update={"vocab_size": None})
    fields = model.model_dump(mode="json", exclude_defaults=True, exclude={"init"})
    return tomli_w.dumps({"model": fields})


def read_recipe(checkpoint_folder: Path, tokenizer: Path | None) -> tuple[Model, Path]:
    """[model] and tokenizer of a checkpoint, from the recipe beside it.

    Raises: ValueError if there is no recipe, or it is not one.
    """
    root = checkpoint_folder.parent.parent
    for name in ("model.toml", "config.toml"):
        if (root / name).is_file():
            recipe = tomllib.loads((root / name).read_text())
            break
    else:
        raise ValueError(
            f"{root} has neither config.toml nor model.toml, which say what model its checkpoints "
            "are of; name a run directory, or a checkpoint inside one"
        )
    model = Model(**recipe["model"] | {"init": {"kind": "random"}})
    if tokenizer is not None:
        return model, tokenizer
    if (root / "tokenizer").is_dir():
        return model, find_tokenizer(root / "tokenizer")
    path = Path(recipe.get("data", {}).get("tokenizer", root / "tokenizer"))
    if not path.is_file():
        raise ValueError(f"{path}, the tokenizer of {root / name}, is not there; give --tokenizer")
    return model, path


def write_tokenizer(path: Path, folder: Path) -> None:
    """Carry a tokenizer over, with what stands beside it if it is named as Hugging Face does."""
    if path.name in ("tokenizer.json", "tokenizer.model"):
        carry_tokenizer(path.parent, folder)
    else:
        shutil.copyfile(path, folder / f"tokenizer{path.suffix}")


def write_description(
    folder: Path, model: Model, *, vocab_size: int, eos: int, dtype: torch.dtype
) -> None:
    """config.json, with the special ids that came with the tokenizer, or its end of document."""
    special = special_ids(folder)
    if special.eos is None:
        special = SpecialIds(special.bos, eos, special.pad)
    name = str(dtype).removeprefix("torch.")
    described = describe(model, vocab_size=vocab_size, special=special, dtype=name)
    (folder / "config.json").write_text(json.dumps(described, indent=1))


@contextmanager
def one_process(dtype: torch.dtype) -> Iterator[Platform]:
    """Megatron-Core's process groups with this process alone in them."""
    import torch.distributed as dist

    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= alone | {"MASTER_PORT": str(free_port())}
    platform = replace(cpu(PlatformConfig(kind="cpu")), params_dtype=dtype)
    parallel.initialize(Parallel(world_size=1), platform, seed=1)
    try:
        yield platform
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder that becomes `folder` on success and is removed otherwise.

    Raises: ValueError if `folder` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
