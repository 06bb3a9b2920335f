"""What the processes of `workers.py` do with Hugging Face folders and converted checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import numpy as np
import tasks
import torch
from workers import Context

from megatron_sip import checkpoint, checkpoint_files
from megatron_sip.config_model import Model
from megatron_sip.convert.hf_folder import find_tokenizer, read_model
from megatron_sip.convert.load import load_folder
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.forward import token_logprobs
from megatron_sip.model import build_module, transformer_config
from megatron_sip.rollout.weight_source import MegatronWeightSource

Tensors = dict[str, np.ndarray]


def module_of(ctx: Context, model: Model) -> Any:
    """Parameters hold NaN until they are loaded."""
    assert model.vocab_size is not None
    config = transformer_config(model, ctx.parallel, ctx.platform)
    module = build_module(config, model, ctx.platform, vocab_size=model.vocab_size)
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)
    return module


def identity_of(model: Model, folder: Path) -> dict[str, Any]:
    assert model.vocab_size is not None
    digest = Tokenizer.load(find_tokenizer(folder)).digest
    return checkpoint_files.model_identity(
        model, vocab_size=model.vocab_size, tokenizer_digest=digest
    )


def export(ctx: Context, module: Any, model: Model) -> Tensors:
    assert model.vocab_size is not None
    source = MegatronWeightSource(
        tasks.bare(module), model, ctx.ranks, ctx.platform, vocab_size=model.vocab_size
    )
    return {n: t.detach().numpy().copy() for n, t in source}


def logprobs(module: Any, tokens: np.ndarray) -> np.ndarray | None:
    """Of tokens[:, 1:], on the rank that has them."""
    ids = torch.from_numpy(tokens)
    rows = replace(
        tasks.micro_batches(cases.CASES["nll"], np.arange(2))[0],
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=torch.arange(ids.shape[1] - 1).expand(len(ids), -1).contiguous(),
    )
    found = token_logprobs(module.eval(), [rows])
    return found[0].numpy() if found else None


def read_folders(
    ctx: Context, folders: dict[str, Path], tokens: np.ndarray, divisor: int
) -> dict[str, Any]:
    """Each folder, read by slices: log-probs, and the weights as they are exported."""
    found = {}
    for name, folder in folders.items():
        model = read_model(folder).model_copy(update={"make_vocab_size_divisible_by": divisor})
        module = module_of(ctx, model)
        load_folder(folder, module, model, vocab_size=model.vocab_size or 0)
        found[name] = {
            "weights": export(ctx, module, model),
            "logprobs": logprobs(module, tokens),
        }
    return found


def read_checkpoints(ctx: Context, folders: dict[str, Path], made: dict[str, Path]) -> Any:
    """Each converted checkpoint, loaded in this layout: the weights as they are exported."""
    found = {}
    for name, folder in folders.items():
        model = read_model(folder)
        module = module_of(ctx, model)
        checkpoint.load_weights(
            made[name], module=module, identity=identity_of(model, folder), ranks=ctx.ranks
        )
        found[name] = export(ctx, module, model)
    return found


def save_folders(ctx: Context, folders: dict[str, Path], run_dir: Path) -> None:
    """Each folder, read by slices and saved by this layout as a checkpoint."""
    for name, folder in folders.items():
        model = read_model(folder).model_copy(update={"make_vocab_size_divisible_by": 4})
        module = module_of(ctx, model)
        load_folder(folder, module, model, vocab_size=model.vocab_size or 0)
        checkpoint.save_weights(
            run_dir / name, 0, module=module, identity=identity_of(model, folder)
        )
