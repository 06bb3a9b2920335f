"""What --explain says of a rank's GPU memory is what a real step holds there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import explain_tasks
import gpu_tasks
import pytest
import torch
from workers import Context

from megatron_sip.config import Config
from megatron_sip.explain.memory import Memory, rank_memory
from megatron_sip.explain.parameters import count_parameters
from megatron_sip.explain.plan import describe_platform
from megatron_sip.explain.shapes import policy_shape
from megatron_sip.explain.workload import plans, workload
from megatron_sip.recipe import load_config

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]

CONFIGS = Path(__file__).parents[2] / "configs"
VOCAB = 32000
COMMON = (
    "platform.kind=cuda", "parallel.world_size=1", "data.global_batch_size=8",
    "data.micro_batch_size=8", "model.num_layers=8", "model.hidden_size=1024",
    "model.ffn_hidden_size=2816", "model.num_attention_heads=16", "model.num_query_groups=8",
    "model.max_sequence_length=512",
)  # fmt: skip
RECIPES = {
    "nll": ("quickstart_ntp.toml", "data.prefix_tokens=64", "data.suffix_tokens=448"),
    "dpo, shared_prefix": (
        "quickstart.toml", "data.prefix_tokens=384", "data.suffix_tokens=64",
        "rollout.weight_transfer=nccl", "servers.policy.max_model_len=512",
        "servers.policy.gpus=[1]", "servers.judge.gpus=[2]",
    ),
}  # fmt: skip
KEPT = ("weights", "gradients", "optimizer", "start_policy", "activations")


def recipe(name: str) -> Config:
    file, *overrides = RECIPES[name]
    return load_config(CONFIGS / file, (*COMMON, *overrides))


def estimated(config: Config) -> Memory:
    (plan,) = plans(config)
    work = workload(config, plan, describe_platform(config))
    shape = policy_shape(config.model, vocab_size=VOCAB)
    parameters = count_parameters(config.model, config.parallel, vocab_size=VOCAB)
    return rank_memory(config, parameters, work, shape)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_tensors_of_a_step_are_within_a_tenth_of_the_estimate(
    context: Callable[..., Context], name: str, record_property: Any
) -> None:
    config = recipe(name)
    expected = estimated(config)
    found = explain_tasks.measured_step(context("transformer_engine"), config, VOCAB)
    ratios = {part: getattr(expected, part) / found[part] for part in KEPT
              if getattr(expected, part)}  # fmt: skip
    print(
        f"{name}: estimate over measured: " + ", ".join(f"{k} {v:.3f}" for k, v in ratios.items())
    )
    record_property("estimate_over_measured", ratios)
    for ratio in ratios.values():
        assert ratio == pytest.approx(1, abs=0.1)


def plain_step(ctx: Context, config: Config) -> None:
    """Two steps with a frozen copy: the first one makes the optimizer's state."""
    learner = gpu_tasks.learner_of(ctx, config.model, VOCAB, config.optimizer)
    reference = gpu_tasks.copy_of(ctx, learner.policy, config.model, VOCAB)
    batches = explain_tasks.micro_batches(ctx, config, VOCAB)
    for _ in range(2):
        learner.learn(
            batches, config.objective, reference=reference, version=0, fresh_reference=False
        )


@pytest.mark.parametrize("name", RECIPES)
def test_peak_of_a_step_is_the_estimate_and_temporary_tensors(
    context: Callable[..., Context], name: str, record_property: Any
) -> None:
    config = recipe(name)
    expected = estimated(config)
    gc.collect()  # what earlier tests left
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plain_step(context("transformer_engine"), config)
    peak = torch.cuda.max_memory_allocated() - before
    said = expected.steady + expected.activations
    said += 0 if expected.start_policy else expected.weights  # plain_step has a copy always
    print(f"{name}: peak {peak / 2**20:.0f} MiB, estimate {said / 2**20:.0f} MiB")
    record_property("peak_over_estimate", peak / said)
    assert 0.9 <= peak / said <= 1.25
