"""What --explain says of the quickstart is what a real step of it holds and computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import explain_tasks
import pytest
from workers import Layout, Workers

from megatron_sip.config import Config
from megatron_sip.explain.flops import forward_flops, training_flops
from megatron_sip.explain.memory import rank_memory
from megatron_sip.explain.parameters import count_parameters
from megatron_sip.explain.plan import describe_platform
from megatron_sip.explain.ranks import place
from megatron_sip.explain.shapes import Shape, policy_shape
from megatron_sip.explain.workload import Workload, plans, workload
from megatron_sip.recipe import load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
VOCAB = 4096
WITHIN = 0.02  # the promise is 0.10
LAYOUTS = [Layout(dp=2), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)]
CASES = [(layout, tied) for layout in LAYOUTS for tied in (False, True)]
SPREAD = Layout(dp=2, ep=2)
EXPERTS = (
    'model.family="mixtral"',
    "model.experts.num_experts=4",
    "model.experts.experts_per_token=2",
)
_measured: dict[tuple[Layout, bool], list[dict[str, Any]]] = {}


def recipe(layout: Layout, tied: bool) -> Config:
    """The quickstart with two prompts a step, so that a replica has one micro-batch at most."""
    overrides = (
        f"parallel.world_size={layout.world_size}",
        f"parallel.tensor_model_parallel_size={layout.tp}",
        f"parallel.pipeline_model_parallel_size={layout.pp}",
        f"model.share_embeddings_and_output_weights={str(tied).lower()}",
        "data.global_batch_size=2",
        f"data.micro_batch_size={2 // layout.dp}",
    )
    if layout.ep > 1:
        overrides += (*EXPERTS, f"parallel.expert_model_parallel_size={layout.ep}")
    return load_config(QUICKSTART, overrides)


def measured(workers: Workers, layout: Layout, tied: bool) -> list[dict[str, Any]]:
    """One real step, each rank's measurements."""
    if (layout, tied) not in _measured:
        config = recipe(layout, tied)
        _measured[layout, tied] = workers.run(layout, explain_tasks.measured_step, config, VOCAB)
    return _measured[layout, tied]


def estimated(config: Config) -> tuple[Workload, Shape]:
    (plan,) = plans(config)
    work = workload(config, plan, describe_platform(config))
    return work, policy_shape(config.model, vocab_size=VOCAB)


@pytest.mark.parametrize(("layout", "tied"), [*CASES, (SPREAD, False)], ids=str)
def test_parameters_of_every_rank_are_those_of_the_real_model(
    workers: Workers, layout: Layout, tied: bool
) -> None:
    config = recipe(layout, tied)
    found = count_parameters(config.model, config.parallel, vocab_size=VOCAB)
    for rank, real in enumerate(measured(workers, layout, tied)):
        assert place(rank, config.parallel) == real["place"]
        assert found.per_rank[real["place"][1]] == real["parts"]
        assert real["spread"] == real["parts"]["experts"]


@pytest.mark.parametrize(("layout", "tied"), [*CASES, (SPREAD, False)], ids=str)
@pytest.mark.parametrize(
    "part", ["weights", "gradients", "optimizer", "start_policy", "activations"]
)
def test_tensors_of_every_rank_are_within_a_tenth_of_the_estimate(
    workers: Workers, layout: Layout, tied: bool, part: str, record_property: Any
) -> None:
    config = recipe(layout, tied)
    work, shape = estimated(config)
    parameters = count_parameters(config.model, config.parallel, vocab_size=VOCAB)
    stages = rank_memory(config, parameters, work, shape)
    for real in measured(workers, layout, tied):
        ratio = getattr(stages[real["place"][1]], part) / real[part]
        record_property("estimate_over_measured", ratio)
        uneven = layout == SPREAD and part == "activations"  # more tokens for one rank's experts
        assert ratio == pytest.approx(1, abs=0.1 if uneven else WITHIN)


@pytest.mark.parametrize(("layout", "tied"), CASES, ids=str)
def test_flops_of_a_step_are_within_a_tenth_of_the_estimate(
    workers: Workers, layout: Layout, tied: bool, record_property: Any
) -> None:
    work, shape = estimated(recipe(layout, tied))
    rows = {"rows": work.rows, "length": work.row_length, "causal_share": 1.0}
    expected = training_flops(shape, **rows) + forward_flops(shape, **rows)  # with the reference
    real = sum(rank["flops"] for rank in measured(workers, layout, tied))
    record_property("estimate_over_measured", expected / real)
    assert expected / real == pytest.approx(1, abs=WITHIN)
