"""Platform: what both sides hand to Megatron-Core is what the installed version takes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sip.branch_attention import BranchAttention
from megatron_sip.config import Fp8, Model, Parallel, PlatformConfig
from megatron_sip.platform import PLATFORMS, Platform, cuda

PACKAGE = Path(__file__).parents[2] / "megatron_sip"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
FP8S = [None, *(Fp8(recipe=r, param=p) for r in RECIPES for p in (False, True))]
MODEL = Model(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=32,
)  # fmt: skip


def on_cpu() -> Platform:
    """Without the patches that `cpu()` installs for good."""
    return Platform("cpu", "gloo", torch.device("cpu"), torch.float32, None)


def on_cuda(fp8: Fp8 | None = None) -> Platform:
    return Platform("cuda", "nccl", torch.device("cuda", 0), torch.bfloat16, fp8)


PLATFORM_CASES = [on_cpu(), *(on_cuda(fp8) for fp8 in FP8S)]


def case_id(platform: Platform) -> str:
    fp8 = platform.fp8
    return platform.kind + (f"-{fp8.recipe}-param={fp8.param}" if fp8 else "")


@pytest.mark.parametrize("platform", PLATFORM_CASES, ids=case_id)
def test_installed_megatron_core_knows_every_field(platform: Platform) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    for kind, fields in (
        (TransformerConfig, platform.transformer_config_fields()),
        (DistributedDataParallelConfig, platform.ddp_config_fields()),
        (OptimizerConfig, platform.optimizer_config_fields()),
    ):
        assert set(fields) <= {f.name for f in dataclasses.fields(kind) if f.init}, kind


@pytest.mark.parametrize("platform", PLATFORM_CASES, ids=case_id)
def test_configs_are_accepted_as_a_whole(platform: Platform) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from megatron_sip.model import transformer_config

    config = transformer_config(MODEL, Parallel(world_size=1), platform)
    assert config.params_dtype == config.pipeline_dtype == platform.params_dtype
    assert config.bf16 == (platform.kind == "cuda")
    assert config.calculate_per_token_loss
    assert config.hidden_dropout == config.attention_dropout == 0
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, **platform.ddp_config_fields()
    )
    assert ddp.grad_reduce_in_fp32
    optimizer = OptimizerConfig(
        optimizer="adam", lr=0.1, use_distributed_optimizer=True,
        **platform.optimizer_config_fields(),
    )  # fmt: skip
    assert optimizer.bf16 == (platform.kind == "cuda")


def test_sequence_parallel_config_of_tp_two_is_accepted_for_cuda() -> None:
    from megatron_sip.model import transformer_config

    parallel = Parallel(world_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert transformer_config(MODEL, parallel, on_cuda()).sequence_parallel


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("param", [False, True])
def test_fp8_recipe_is_megatrons_word_in_model_ddp_and_optimizer(recipe: Any, param: bool) -> None:
    from megatron.core.enums import Fp8Recipe

    platform = on_cuda(Fp8(recipe=recipe, param=param, format="e4m3"))
    model, ddp, optimizer = (
        platform.transformer_config_fields(),
        platform.ddp_config_fields(),
        platform.optimizer_config_fields(),
    )
    assert Fp8Recipe(model["fp8_recipe"]) == recipe == optimizer["fp8_recipe"]
    assert (model["fp8"], model["fp8_param"], ddp["fp8_param_gather"]) == ("e4m3", param, param)
    reuse = param and recipe == "mxfp8"
    assert ddp["reuse_grad_buf_for_mxfp8_param_ag"] is reuse
    assert optimizer["reuse_grad_buf_for_mxfp8_param_ag"] is reuse


@pytest.mark.parametrize(("length", "algorithm"), [(1, "most_recent"), (1024, "max")])
def test_amax_history_takes_its_maximum(length: int, algorithm: str) -> None:
    fields = on_cuda(Fp8(recipe="delayed", amax_history_len=length)).transformer_config_fields()
    assert fields["fp8_amax_history_len"] == length
    assert fields["fp8_amax_compute_algo"] == algorithm


def test_no_fp8_field_is_passed_without_fp8() -> None:
    for platform in (on_cpu(), on_cuda()):
        named = (
            platform.transformer_config_fields()
            | platform.ddp_config_fields()
            | platform.optimizer_config_fields()
        )
        assert not [name for name in named if "fp8" in name]


@pytest.mark.parametrize(
    ("recipe", "multiple"),
    [(None, 1), ("delayed", 16), ("tensorwise", 16), ("blockwise", 16), ("mxfp8", 32)],
)
def test_token_multiple_of_each_recipe(recipe: Any, multiple: int) -> None:
    platform = on_cuda(Fp8(recipe=recipe) if recipe else None)
    assert platform.token_multiple(tensor_parallel=4, sequence_parallel=False) == multiple
    assert platform.token_multiple(tensor_parallel=4, sequence_parallel=True) == 4 * multiple


def test_cuda_without_a_gpu_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'platform\.kind is "cuda".*set platform\.kind = "cpu"'):
        cuda(PlatformConfig(kind="cuda"))


def test_cuda_without_transformer_engine_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='transformer_engine is not installed; install the "gpu"'):
        cuda(PlatformConfig(kind="cuda"))


def test_every_kind_of_the_recipe_has_its_platform() -> None:
    kinds = PlatformConfig.model_fields["kind"].annotation
    assert set(PLATFORMS) == set(kinds.__args__)


def test_memory_of_this_process_is_measured() -> None:
    assert 0.05 < on_cpu().peak_memory_gib() < 64


def megatron_callables() -> dict[str, list[Callable[..., Any]]]:
    """What the package calls of Megatron-Core, by the name under which it calls it."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert callable(finalize_model_grads)
    methods = {
        "start_param_sync": DistributedDataParallel.start_param_sync,
        "zero_grad_buffer": DistributedDataParallel.zero_grad_buffer,
        "sharded_state_dict": DistributedOptimizer.sharded_state_dict,
        "_postprocess": GPTModel._postprocess,
    }
    return {
        "initialize_model_parallel": [parallel_state.initialize_model_parallel],
        "model_parallel_cuda_manual_seed": [tensor_parallel.model_parallel_cuda_manual_seed],
        "TransformerConfig": [TransformerConfig],
        "SipGPTModel": [GPTModel],
        "model": [GPTModel.forward],
        "copy_to_tensor_model_parallel_region": [
            tensor_parallel.copy_to_tensor_model_parallel_region
        ],
        "gather_from_sequence_parallel_region": [
            tensor_parallel.gather_from_sequence_parallel_region
        ],
        "get_gpt_decoder_block_spec": [get_gpt_decoder_block_spec],
        "DistributedDataParallelConfig": [DistributedDataParallelConfig],
        "DistributedDataParallel": [DistributedDataParallel],
        "Float16Module": [Float16Module],
        "OptimizerConfig": [OptimizerConfig],
        "get_megatron_optimizer": [get_megatron_optimizer],
        "OptimizerParamScheduler": [OptimizerParamScheduler],
        "get_forward_backward_func()": [
            schedules.forward_backward_no_pipelining,
            schedules.forward_backward_pipelining_without_interleaving,
        ],
        "dist_checkpointing.save": [dist_checkpointing.save],
        "dist_checkpointing.load": [dist_checkpointing.load],
    } | {name: [method] for name, method in methods.items()}


METHODS = ("model", "start_param_sync", "zero_grad_buffer", "sharded_state_dict", "_postprocess")
OUR_OWN = {"with_entropy"}  # keywords of SipGPTModel.forward that GPTModel's does not have
FILES = ("platform", "parallel", "gpt", "model", "forward", "learner", "optimizer", "checkpoint",
         "rollout/weight_source")  # fmt: skip


def calls(known: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """Calls in the package's Megatron files whose callee is named in `known`."""
    for file in FILES:
        for node in ast.walk(ast.parse((PACKAGE / f"{file}.py").read_text())):
            if not isinstance(node, ast.Call):
                continue
            full = ast.unparse(node.func)
            for name in (full, full.rsplit(".", 1)[-1]):
                if name in known:
                    yield name, node
                    break


def test_every_argument_passed_to_megatron_core_is_one_of_the_installed_signature() -> None:
    known = megatron_callables()
    seen = set()
    for name, call in calls(set(known)):
        if name == "sharded_state_dict" and not call.args:
            continue  # the module's, without arguments
        seen.add(name)
        me = [None] if name in METHODS else []
        for target in known[name]:
            signature = inspect.signature(target)
            named = {k.arg for k in call.keywords if k.arg is not None}
            keywords = dict.fromkeys(named - OUR_OWN)
            signature.bind_partial(*me, *([None] * len(call.args)), **keywords)
            if not any(k.arg is None for k in call.keywords):
                signature.bind(*me, *([None] * len(call.args)), **keywords)
            accepts_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
            assert not accepts_all or set(keywords) <= set(signature.parameters)
    assert seen == set(known), "the package no longer calls these; take them out of this test"


def test_decoder_spec_is_local_on_cpu_and_transformer_engine_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.models.gpt import gpt_layer_specs

    asked = []

    def spec(**named: Any) -> SimpleNamespace:
        asked.append(named)
        parts = SimpleNamespace(core_attention="the kernel of the spec")
        attention = SimpleNamespace(self_attention=SimpleNamespace(submodules=parts))
        return SimpleNamespace(layer_specs=[SimpleNamespace(submodules=attention)])

    monkeypatch.setattr(gpt_layer_specs, "get_gpt_decoder_block_spec", spec)
    kept = []
    for platform in (on_cpu(), on_cuda()):
        (layer,) = platform.decoder_spec("config").layer_specs
        built = layer.submodules.self_attention.submodules.core_attention
        assert built.func is BranchAttention
        kept.append(built.keywords["causal"])
    assert kept == [None, "the kernel of the spec"]
    assert [a["use_transformer_engine"] for a in asked] == [False, True]
    assert all(a["normalization"] == "RMSNorm" and a["config"] == "config" for a in asked)
