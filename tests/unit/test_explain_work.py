"""Work of a step that --explain states: rows, verdicts, FLOPs, seconds; by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from pool_helpers import candidate, pool, sample

from megatron_sip.config import Config
from megatron_sip.config_objective import (
    DpoObjective,
    DpoRewriteObjective,
    GrpoObjective,
    NllObjective,
    Objective,
    RfNllObjective,
    SftRewriteObjective,
    SimpoObjective,
)
from megatron_sip.cost import devices_of
from megatron_sip.experience import no_rewards
from megatron_sip.explain.flops import Prompts, forward_flops, serving_flops, training_flops
from megatron_sip.explain.plan import describe_platform, too_long
from megatron_sip.explain.roles import TRAINER, Role, roles_of
from megatron_sip.explain.samples import measure_lengths
from megatron_sip.explain.servers import PORT, server_plans
from megatron_sip.explain.shapes import Shape, policy_shape
from megatron_sip.explain.speed import Hardware, bottleneck, decode_bytes
from megatron_sip.explain.workload import Workload, plans, rows_per_pool, workload
from megatron_sip.objectives import OBJECTIVES
from megatron_sip.recipe import load_config
from megatron_sip.rows import make_rows
from megatron_sip.serving.server import server_command

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = Shape(2, 8, 16, 4, 2, 2, 10, tied=False)  # 1152 parameters in layers, 80 in the head
STAGED = (
    'curriculum={ kind = "staged", sources = ["suffix", "rewrite", "rollout"], nll_tokens = 9, '
    "rf_nll_rollouts = 2 }"
)
PAIRWISE = (
    'judge.criteria=[{ form = "pairwise", name = "quality", server = "judge", '
    'prompt = "quality_pairwise_v1" }, { form = "pointwise", name = "safety", server = "judge", '
    'prompt = "safety_pointwise_v1" }]'
)


def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)


def stages(config: Config) -> list[Workload]:
    return [workload(config, plan, describe_platform(config)) for plan in plans(config)]


def test_quickstart_step_by_hand() -> None:
    (work,) = stages(recipe("quickstart"))
    assert (work.prompts, work.rollouts, work.rewrites, work.candidates) == (8, 64, 8, 10)
    assert work.verdicts == {"likelihood": 80, "novelty": 80}
    # 63 tokens of the prefix, and 32 of each branch: three pairs and the suffix
    assert (work.rows, work.row_length, work.row_tokens) == (8, 63 + 7 * 32, 8 * 287)
    assert (work.rows_per_micro_batch, work.micro_batches) == (4, 1)
    assert work.uses_reference


def test_padded_rows_of_the_quickstart_by_hand() -> None:
    (work,) = stages(recipe("quickstart", "objective.row_layout=padded"))
    assert (work.rows, work.row_length, work.row_tokens) == (8 * 7, 95, 56 * 95)
    assert (work.rows_per_micro_batch, work.micro_batches) == (28, 1)


def test_paper_step_has_the_papers_number_of_verdicts() -> None:
    (work,) = stages(recipe("continual_quality"))
    assert work.verdicts == {"quality": 256 * 16 * 15 // 2} == {"quality": 30_720}
    assert (work.rollouts, work.rows, work.row_length) == (4096, 512, 2047)
    assert work.micro_batches == 64


def test_next_token_prediction_asks_nobody() -> None:
    (work,) = stages(recipe("quickstart_ntp"))
    assert (work.rollouts, work.candidates, work.verdicts) == (0, 0, {})
    assert work.rows == 16 and not work.uses_reference


def test_stages_of_a_curriculum_differ() -> None:
    nll, rf_nll, final = stages(recipe("quickstart", STAGED))
    assert [w.stage for w in (nll, rf_nll, final)] == ["nll", "rf_nll", "final"]
    assert [w.rollouts for w in (nll, rf_nll, final)] == [0, 16, 64]
    assert [w.row_tokens for w in (nll, rf_nll, final)] == [8 * 95, 8 * 95, 8 * 287]
    assert [w.verdicts["likelihood"] for w in (nll, rf_nll, final)] == [0, 32, 80]
    assert [w.uses_reference for w in (nll, rf_nll, final)] == [False, False, True]


@pytest.mark.parametrize(
    ("overrides", "rows", "reference", "asked"),
    [
        (['objective={ name = "grpo" }'], 8, False, 80),
        (['objective={ name = "grpo", kl_weight = 0.1 }'], 8, True, 80),
        (['objective={ name = "dpo_rewrite" }'], 2, True, 0),
        (['objective={ name = "sft_rewrite" }'], 1, False, 0),
        (['objective={ name = "simpo" }'], 2, False, 80),
        (['reference={ kind = "rollout" }'], 1, False, 80),  # the quickstart's own rows: shared
        (['reference={ kind = "snapshot", interval = 5 }'], 1, True, 80),
    ],
)
def test_rows_reference_pass_and_verdicts_follow_the_objective(
    overrides: list[str], rows: int, reference: bool, asked: int
) -> None:
    (work,) = stages(recipe("quickstart", *overrides))
    assert (work.rows, work.uses_reference) == (8 * rows, reference)
    assert work.verdicts["likelihood"] == work.verdicts["novelty"] == asked


def test_row_length_is_rounded_up_for_fp8() -> None:
    config = recipe("continual_quality", "platform.fp8={}")
    (work,) = stages(config)
    assert (work.row_length, work.row_multiple) == (2048, 16)


@pytest.mark.parametrize(
    "settings",
    [
        NllObjective(name="nll"),
        NllObjective(name="nll", prefix_weight=1.0),
        RfNllObjective(name="rf_nll", prefix_weight=1.0),
        DpoObjective(name="dpo"),
        DpoObjective(name="dpo", pairs_per_pool=3, suffix_weight=0.5, prefix_weight=0.5),
        SftRewriteObjective(name="sft_rewrite"),
        DpoRewriteObjective(name="dpo_rewrite", pairs_per_pool=2),
        SimpoObjective(name="simpo", chosen_weight=0.5),
        GrpoObjective(name="grpo", prefix_weight=1.0),
        GrpoObjective(name="grpo", suffix_weight=0.5),
    ],
    ids=lambda s: f"{s.name}-{s.prefix_weight}",
)
def test_rows_of_a_pool_are_those_that_are_made(settings: Objective) -> None:
    one = pool(sample(1, (1, 2, 3), (4, 5)), *(candidate((6, 7)) for _ in range(6)))
    picks = OBJECTIVES[settings.name][0]([one], [no_rewards(6)], settings, [()])
    rows = make_rows([one], picks, length=8, pad=0)
    assert len(rows.tokens) == rows_per_pool(settings, 6)


def test_forward_and_training_flops_by_hand() -> None:
    # 15 tokens x 2 x 1232, and 3 rows x 4 x 25 scores x 2 layers x 8
    rows = {"rows": 3, "length": 5}
    assert forward_flops(SMALL, **rows, causal_share=1.0) == 36_960 + 4_800
    assert forward_flops(SMALL, **rows, causal_share=0.5) == 36_960 + 2_400
    # the head's 15 x 2 x 80 a fourth time
    assert training_flops(SMALL, **rows, causal_share=1.0) == 3 * 41_760 + 2_400


def test_serving_flops_by_hand() -> None:
    work = Prompts(requests=2, prompt_tokens=5, shared_tokens=5, pools=1, new_tokens=3)
    # 10 prompt and 4 new tokens through the layers, 2 + 4 through the head; contexts 25 + 26
    alone = 2 * (14 * 1152 + 6 * 80) + 4 * 51 * 16
    assert serving_flops(SMALL, work, prefix_cache=False) == alone == 36_480
    shared = 2 * (9 * 1152 + 6 * 80) + 4 * 38.5 * 16
    assert serving_flops(SMALL, work, prefix_cache=True) == shared == 24_160


def test_scored_prompts_cost_a_forward_pass_whatever_is_cached() -> None:
    work = Prompts(4, 6, shared_tokens=5, pools=1, scores_prompt=True)
    full = forward_flops(SMALL, rows=4, length=6, causal_share=0.5)
    assert serving_flops(SMALL, work, prefix_cache=True) == full
    assert serving_flops(SMALL, work, prefix_cache=False) == full


def roles(config: Config, served: dict[str, Shape | None]) -> dict[str, Role]:
    policy = policy_shape(config.model, vocab_size=4096)
    lengths = measure_lengths(config, None, None)
    (work,) = stages(config)
    found = roles_of(config, work, policy=policy, served=served, lengths=lengths)
    return {role.name: role for role in found}


def test_roles_of_the_quickstart() -> None:
    config = recipe("quickstart")
    policy = policy_shape(config.model, vocab_size=4096)
    found = roles(config, {"policy": policy, "judge": SMALL})
    assert list(found) == [
        "rollout", "rewrite", "judge: likelihood", "judge: novelty", "reference", "train",
        "evaluation", "evaluation: rollout", "evaluation: judge",
    ]  # fmt: skip
    assert found["rollout"].new_tokens == 64 * 32
    assert found["judge: likelihood"].prompt_tokens == 80 * (64 + 32)  # at the most
    assert found["judge: novelty"].flops == 0
    head = 2 * 8 * 287 * 4096 * 256  # computed once more in the backward pass
    train, reference = found["train"].flops, found["reference"].flops
    assert train is not None and reference is not None and train == 3 * reference + head
    # 512 prefixes, twice in 48 steps; two scorers on 512 rows of 95 positions
    assert found["evaluation"].prompt_tokens == pytest.approx(2 * 512 * 95 * 2 / 48)
    assert found["evaluation: rollout"].requests == pytest.approx(512 * 4 * 2 / 48)


def test_unknown_model_leaves_its_roles_without_flops() -> None:
    config = recipe("quickstart")
    found = roles(config, {"policy": SMALL, "judge": None})
    assert [n for n, r in found.items() if r.flops is None] == [
        "rewrite", "judge: likelihood", "evaluation: judge"
    ]  # fmt: skip


def test_prompts_that_a_server_would_refuse_are_named() -> None:
    config = recipe("quickstart", "servers.judge.max_model_len=64")
    found = too_long(config, list(roles(config, {"policy": SMALL, "judge": SMALL}).values()))
    assert [text.split(": a request")[0] for text in found] == [
        "rewrite", "judge: likelihood", "evaluation: judge"
    ]  # fmt: skip
    assert "about 97 tokens, more than servers.judge.max_model_len 64" in found[1]


def test_assumed_prompts_follow_the_form() -> None:
    found = measure_lengths(recipe("quickstart", PAIRWISE), None, None)
    assert not any(found.measured.values())
    quality, safety = "judge: quality", "judge: safety"
    assert found.shared == {quality: 64, safety: 0, "evaluation: judge": 64, "rewrite": 0}
    assert found.prompts["evaluation: judge"] == 64 + 32
    assert 100 < found.prompts[quality] - 64 - 2 * 32 < 200  # the prompt's own words
    assert 70 < found.prompts[safety] - 32 < 150  # sees no prefix


def test_commands_are_those_of_the_fleet_but_for_the_port() -> None:
    config = recipe("quickstart")
    policy, judge = server_plans(config, SMALL)
    settings = config.servers["judge"]
    assert settings.kind == "start" and (policy.role, judge.role) == ("policy", "text")
    argv, environment = server_command(
        settings, name="judge", model_dir=Path(str(settings.model)), port=4711,
        platform_kind="cpu", role="text", weight_transfer=None,
    )  # fmt: skip
    assert [PORT if a == "4711" else a for a in argv] == list(judge.command)
    assert judge.environment == environment
    assert policy.command[policy.command.index("--model") + 1] == "runs/quickstart/servers/policy"
    assert (policy.weights, judge.weights) == (4 * 1352, 4 * 134_515_008 if judge.shape else None)
    assert judge.users == ("evaluation", "judge: likelihood", "rewrite")


def test_connected_and_absent_models_are_unknown() -> None:
    _, connected = server_plans(recipe("continual_quality"), SMALL)
    assert connected.shape is None and connected.command == () and connected.gpus == ()
    assert connected.unknown.startswith('kind = "connect"')
    _, absent = server_plans(recipe("quickstart", "servers.judge.model=/nowhere"), SMALL)
    assert absent.shape is None and "/nowhere/config.json is not there" in absent.unknown


def test_seconds_follow_from_the_assumed_hardware() -> None:
    config, h = recipe("continual_quality"), Hardware()
    servers = server_plans(config, SMALL)
    train = Role("train", TRAINER, 0, 10, 0, 8e15, 8e15)
    rollout = Role("rollout", "policy", 1024, 1024 * 5, 1024 * 3, 1.0, 1.0)
    judge = Role("judge: quality", "judge", 10, 1e6, 10, None, None)
    found = bottleneck(config, (train, rollout, judge), servers)
    seconds = {t.role: t.seconds for t in found.times}
    assert seconds["train"] == pytest.approx(8e15 / (4 * 989e12 * 0.4))
    # two batches of 512 read 1352 weights for each of 3 tokens; keys and values of 6.5 tokens
    read = 2 * 3 * 1352 * 2 + 1024 * 3 * 6.5 * (2 * 2 * 4 * 2)
    assert decode_bytes(rollout, servers[:1], config) == read
    assert seconds["rollout"] == pytest.approx(
        read / (4 * h.memory_bandwidth * h.bandwidth_utilisation)
    )
    assert seconds["judge: quality"] is None
    assert found.expected.startswith("judge: quality, unless") and found.expected.endswith("train")


def test_servers_that_share_a_role_share_its_time() -> None:
    second = (
        'servers.second={ kind = "start", model = "policy", max_model_len = 2048, gpus = [8, 9] }'
    )
    bf16 = 'servers.second.dtype="bfloat16"'
    config = recipe("continual_quality", second, bf16, 'rollout.server=["policy", "second"]')
    plans = {plan.name: plan for plan in server_plans(config, SMALL)}
    assert plans["second"].role == "policy" and "rollout" in plans["second"].users
    assert "--load-format" in plans["second"].command
    rollout = Role("rollout", "policy, second", 1024, 1024 * 5, 1024 * 3, 1e18, 1.0)
    assert rollout.servers == ("policy", "second")
    (time,) = bottleneck(config, (rollout,), tuple(plans.values())).times
    h, devices = Hardware(), len(plans["policy"].gpus) + 2
    assert time.devices == devices
    assert time.seconds == pytest.approx(1e18 / (devices * h.bf16_flops * h.serve_utilisation))
    assert devices_of(config, servers=True).by_role["rollout"] == devices


def test_no_seconds_are_claimed_on_a_cpu() -> None:
    config = recipe("quickstart")
    known = Role("train", TRAINER, 0, 10, 0, 3.0, 3.0)
    found = bottleneck(config, (known, Role("judge: a", "judge", 1, 1, 1, None, None)), ())
    assert found.expected == "train" and found.hardware is None
    assert all(t.seconds is None for t in found.times)
    assert any("not known" in r for r in found.reasoning) and "left out" in found.reasoning[-1]
