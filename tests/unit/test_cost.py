"""FLOPs, utilisation and device seconds of a step, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from pool_helpers import candidate, pool, sample

from megatron_sip.config import Config
from megatron_sip.cost import cost_metrics, devices_of, step_flops, used, utilisation
from megatron_sip.experience import no_rewards
from megatron_sip.explain.flops import forward_flops, training_flops
from megatron_sip.explain.hardware import Hardware, peak_flops
from megatron_sip.explain.shapes import Shape
from megatron_sip.objectives import OBJECTIVES
from megatron_sip.recipe import load_config
from megatron_sip.rows import make_micro_batches

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = Shape(2, 8, 16, 4, 2, 2, 10, tied=False)
TIMES = {
    "time/sample_s": 0.5, "time/rollout_s": 4.0, "time/rewrite_s": 2.0, "time/judge_s": 3.0,
    "time/train_s": 5.0, "time/sync_s": 1.0, "time/step_s": 20.0,
}  # fmt: skip


def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)


@pytest.mark.parametrize("reference", [False, True])
def test_flops_are_those_of_the_padded_rows(reference: bool) -> None:
    settings = recipe("quickstart", "objective.suffix_weight=1.0").objective
    pools = [pool(sample(i, (1, 2, 3), (4, 5)), *[candidate((6, 7))] * 6) for i in range(4)]
    picks = OBJECTIVES[settings.name][0](pools, [no_rewards(6)] * 4, settings, [()] * 4)
    batches = make_micro_batches(
        pools, picks, micro_batch_size=2, length=8, multiple=1, pad=0, layout="padded"
    )
    assert [len(b.tokens) for b in batches] == [14, 14]  # three pairs and the suffix of each
    found = step_flops(SHAPE, batches, uses_reference=reference, platform_kind="cuda")
    rows = {"rows": 28, "length": 8, "causal_share": 0.5}
    assert found == training_flops(SHAPE, **rows) + reference * forward_flops(SHAPE, **rows)
    assert found < step_flops(SHAPE, batches, uses_reference=reference, platform_kind="cpu")


def test_devices_of_the_quickstart_are_its_threads() -> None:
    config = recipe("quickstart", "servers.judge.num_threads=3", "platform.num_threads=2")
    found = devices_of(config, servers=True)  # the judge's server rewrites, too: it counts once
    assert found.by_role == {"trainer": 4, "rollout": 2, "rewrite": 3, "judge": 3}
    assert found.total == 4 + 2 + 3


def test_a_replay_and_next_token_prediction_hold_the_trainer_alone() -> None:
    for config in (recipe("quickstart"), recipe("quickstart_ntp")):
        found = devices_of(config, servers=False)
        assert (found.by_role, found.total) == ({"trainer": 2}, 2)


def test_devices_of_connected_servers_are_left_out() -> None:
    config = recipe("continual_quality")
    found = devices_of(config, servers=True)
    ranks, gpus = config.parallel.world_size, len(config.servers["policy"].gpus)  # type: ignore
    assert found.by_role == {"trainer": ranks, "rollout": gpus}
    assert found.total == ranks + gpus


def test_device_seconds_by_hand_add_up() -> None:
    devices = devices_of(recipe("quickstart"), servers=True)  # 2 each for trainer and two servers
    found = cost_metrics(devices, TIMES)
    assert found == {
        "cost/trainer_device_s": 2 * (5 + 1),
        "cost/rollout_device_s": 2 * (4 + 1),
        "cost/rewrite_device_s": 2 * 2,
        "cost/judge_device_s": 2 * 3,
        "cost/idle_device_s": 6 * 20 - 32,
        "cost/device_s": 6 * 20,
    }
    evaluated = cost_metrics(devices, TIMES | {"time/evaluate_s": 2.0})
    assert evaluated["cost/evaluation_device_s"] == 6 * 2
    assert evaluated["cost/idle_device_s"] == 6 * 20 - 32 - 12


def test_utilisation_by_hand() -> None:
    found = utilisation(1e12, TIMES, num_ranks=2, peak_flops=1e12)
    assert found == {"model/mfu": 1 / 40, "model/train_mfu": 1 / 10}


@pytest.mark.parametrize(
    ("device", "overrides", "peak"),
    [
        ("", (), None),
        ("NVIDIA A100-SXM4-80GB", (), None),
        ("NVIDIA H100 PCIe", (), None),
        ("NVIDIA H100 80GB HBM3", (), Hardware().bf16_flops),
        ("NVIDIA H100 80GB HBM3", ("platform.fp8={}",), Hardware().fp8_flops),
        ("NVIDIA H100 80GB HBM3", ("metrics.peak_tflops=800.0",), 800e12),
        ("", ("metrics.peak_tflops=0.1",), 1e11),
    ],
)
def test_peak_is_the_recipes_or_that_of_a_known_device(device, overrides, peak) -> None:
    assert peak_flops(recipe("continual_quality", *overrides), device) == peak


def test_without_a_peak_there_is_no_utilisation_instead_of_a_guess() -> None:
    metrics = {"model/flops": 1e12, **TIMES}
    unknown = used(recipe("quickstart"), metrics, servers=True, device_name="")
    assert not [name for name in unknown if "mfu" in name]
    config = recipe("quickstart", "metrics.peak_tflops=1.0")
    known = used(config, metrics, servers=True, device_name="")
    assert known["model/mfu"] == 1 / 40 and known["cost/device_s"] == 120
