"""What the tests on a GPU share: platforms, the cases of the distributed tests, new processes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cases
import torch
from workers import Context

from megatron_sip import parallel
from megatron_sip.branch_attention import with_branch_attention
from megatron_sip.config import Fp8, Model, Optimizer, Parallel, PlatformConfig
from megatron_sip.learner import Learner
from megatron_sip.model import (
    build_module,
    frozen_copy,
    initialize_randomly,
    transformer_config,
    wrap_data_parallel,
)
from megatron_sip.optimizer import build_optimizer, build_scheduler
from megatron_sip.platform import PLATFORMS, Platform

KIND = "cuda"
PARALLEL = Parallel(world_size=1)


def missing(name: str) -> str:
    """Why a test must be skipped: "" if it need not."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if name == "transformer_engine" and importlib.util.find_spec(name) is None:
        return "Transformer Engine is not installed"
    return ""


class LocalLayers(Platform):
    """CUDA with Megatron-Core's own layers: no Transformer Engine, and exact fp32."""

    def decoder_spec(self, config: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        spec = get_gpt_decoder_block_spec(
            config=config, use_transformer_engine=False, normalization="RMSNorm"
        )
        return with_branch_attention(spec, keep_causal=False)


def platform(layers: str, fp8: str | None = None) -> Platform:
    """ "local" in fp32, or "transformer_engine" in bf16 with an optional FP8 recipe."""
    device = torch.device("cuda", 0)
    if layers == "local":
        return LocalLayers("cuda", "nccl", device, torch.float32, None)
    recipe = Fp8(recipe=fp8) if fp8 else None  # type: ignore[arg-type]
    return Platform("cuda", "nccl", device, torch.bfloat16, recipe)


@dataclass(frozen=True)
class GpuCase(cases.Case):
    """A case of the distributed tests with heads of 16, the least that FlexAttention takes."""

    @property
    def model(self) -> Model:
        return super().model.model_copy(update={"num_attention_heads": 4, "num_query_groups": 2})


def case(name: str) -> GpuCase:
    return GpuCase(**vars(cases.CASES[name]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(settings: Platform) -> Context:
    """This process as the only rank of an NCCL group."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    return Context(settings, parallel.initialize(PARALLEL, settings, seed=1), PARALLEL)


def alone(task: Callable[..., Any], *args: Any) -> Any:
    """`task(context, *args)` in a new process in deterministic mode, which is for good."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_deterministic, task, args).result()


def _deterministic(task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return task(join(PLATFORMS[KIND](PlatformConfig(kind=KIND, deterministic=True))), *args)


def relative(found: torch.Tensor, expected: torch.Tensor, *, least: float = 0.0) -> float:
    """|found - expected| / |expected|, of the whole tensors; NaN if either holds one."""
    error = (found.double().cpu() - expected.double().cpu()).norm()
    return (error / max(expected.double().norm().item(), least)).item()


def learner_of(ctx: Context, model: Model, vocab_size: int, settings: Optimizer) -> Learner:
    """A learner with random first weights."""
    config = transformer_config(model, ctx.parallel, ctx.platform)
    module = build_module(config, model, ctx.platform, vocab_size=vocab_size)
    initialize_randomly(module, model, seed=1)
    policy = wrap_data_parallel(config, module, settings, ctx.platform)
    optimizer = build_optimizer(policy, settings, ctx.platform)
    scheduler = build_scheduler(optimizer, settings, steps=100)
    return Learner(policy, optimizer, scheduler, ctx.ranks, ctx.platform)


def copy_of(ctx: Context, policy: Any, model: Model, vocab_size: int) -> Any:
    """A frozen copy of the policy, as a run takes its reference."""
    config: Any = SimpleNamespace(model=model)
    return frozen_copy(policy, config, ctx.platform, vocab_size=vocab_size)
