"""Recipes: what is wrong is refused with key, value, rule and remedy; what ships loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_sip.config import ConnectServer, api_key
from megatron_sip.recipe import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.toml"))
MAX_RECIPES, MAX_LINES = 12, 60

SIP = """
[run]
task = "sip"
dir = "runs/test"
steps = 40
[platform]
kind = "cpu"
[model]
num_layers = 4
hidden_size = 256
ffn_hidden_size = 128
num_attention_heads = 8
num_query_groups = 4
max_sequence_length = 96
[parallel]
world_size = 2
[optimizer]
lr = 1e-4
[data]
tokenizer = "t.model"
train = "a"
validation = "b"
test = "c"
prefix_tokens = 64
min_prefix_tokens = 32
suffix_tokens = 32
global_batch_size = 8
micro_batch_size = 4
[servers.policy]
kind = "start"
model = "policy"
max_model_len = 96
[servers.judge]
kind = "connect"
url = "http://127.0.0.1:8000"
model = "judge"
tokenizer = "judge"
[rollout]
server = "policy"
num_rollouts = 4
weight_transfer = "shared_memory"
max_logprob_mismatch = 1e-3
[judge]
cache_dir = "cache"
criteria = [{ form = "likelihood", name = "fit", server = "judge" }]
[objective]
name = "dpo"
pair_sources = ["rollout"]
[curriculum]
kind = "emergent"
sources = ["suffix", "rollout"]
[checkpoint]
interval = 20
[evaluation]
num_prefixes = 16
server = "judge"
"""
SIP_SECTIONS = ("servers", "rollout", "judge", "curriculum")
REWRITER = 'rewriter={ server = "judge", prompt = "p", max_tokens = 8 }'
TWO_OF_A_NAME = (
    'judge.criteria=[{ form = "likelihood", name = "a", server = "judge" },'
    ' { form = "pointwise", name = "a", server = "judge", prompt = "p" }]'
)
SECOND_POLICY = 'servers.second={ kind = "start", model = "policy", max_model_len = 96 }'
STRANGE_JUDGE = 'judge.criteria=[{ form = "likelihood", name = "a", server = "nobody" }]'


@pytest.fixture
def sip(tmp_path: Path) -> Path:
    path = tmp_path / "sip.toml"
    path.write_text(SIP)
    return path


@pytest.fixture
def ntp(tmp_path: Path) -> Path:
    """The same recipe without what only sip uses."""
    text = SIP.replace('task = "sip"', 'task = "ntp"').replace('name = "dpo"', 'name = "nll"')
    text = text.replace('pair_sources = ["rollout"]\n', "").replace('server = "judge"\n', "")
    blocks = [b for b in text.split("\n[") if not b.startswith(SIP_SECTIONS)]
    path = tmp_path / "ntp.toml"
    path.write_text("\n[".join(blocks))
    return path


def refusal(path: Path, *overrides: str) -> str:
    """Message of the error that `overrides` cause."""
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    assert type(caught.value) is ValueError
    return str(caught.value)


def test_the_recipes_of_this_file_are_valid(sip: Path, ntp: Path) -> None:
    assert load_config(sip).optimizer.lr == 1e-4
    assert load_config(ntp).run.task == "ntp"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_is_short(recipe: Path) -> None:
    load_config(recipe)
    lines = [x.strip() for x in recipe.read_text().splitlines()]
    assert sum(bool(x) and not x.startswith("#") for x in lines) <= MAX_LINES


def test_there_are_recipes_but_not_too_many() -> None:
    assert 1 <= len(RECIPES) <= MAX_RECIPES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat: unknown key"),
        ("optimizer.weigth_decay=1.0", 'unknown key; did you mean "weight_decay"?'),
        ("rollouts={}", 'rollouts: unknown key; did you mean "rollout"?'),
        ("objective.bta=0.2", 'bta: unknown key; did you mean "beta"?'),
        ("servers.policy.max_model_length=5", 'did you mean "max_model_len"?'),
        ("curriculum.source=[]", 'did you mean "sources"?'),
        ("platform.fp8={ formt = 1 }", 'did you mean "format"?'),
        ("checkpoint.zzz=1", "keys there: asynchronous, interval"),
        (
            'judge.criteria=[{ form = "likelihood", name = "a", server = "judge", wieght = 1.0 }]',
            'did you mean "weight"?',
        ),
    ],
)
def test_unknown_key_is_refused_and_the_nearest_proposed(
    sip: Path, override: str, message: str
) -> None:
    assert message in refusal(sip, override)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ('optimizer.lr="1e-4"', ("optimizer.lr is '1e-4'", "valid number")),
        ('run.steps="40"', ("run.steps is '40'", "valid integer")),
        ("run.steps=40.0", ("run.steps is 40.0", "integer")),
        ("run.steps=true", ("run.steps is True", "integer")),
        ("run.steps=0", ("run.steps is 0", "greater than 0")),
        ("parallel.sequence_parallel=1", ("sequence_parallel is 1", "boolean")),
        ('platform.kind="tpu"', ("platform.kind is 'tpu'", "'cpu' or 'cuda'")),
        ("rollout.top_p=1.5", ("rollout.top_p is 1.5", "less than or equal to 1")),
        ("judge.criteria=[]", ("judge.criteria is []", "at least 1 item")),
        ('curriculum.sources=["web"]', ("curriculum", "sources", "'web'", "'rollout'")),
    ],
)
def test_wrong_value_is_refused_with_key_value_and_rule(
    sip: Path, override: str, parts: tuple[str, ...]
) -> None:
    message = refusal(sip, override)
    assert all(part in message for part in parts), message


def test_missing_key_is_named_and_all_errors_come_at_once(sip: Path) -> None:
    sip.write_text(SIP.replace("lr = 1e-4", "").replace("steps = 40", 'steps = "x"'))
    message = refusal(sip)
    assert "optimizer.lr: required and missing" in message and "run.steps is 'x'" in message


EXPERTS = (
    'model.family="mixtral"',
    "model.experts.num_experts=5",
    "model.experts.experts_per_token=2",
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_size=65"], "hidden_size 65 must be a multiple of model.num_attention"),
        (["model.num_query_groups=3"], "heads 8 must be a multiple of model.num_query_groups 3"),
        (
            ["parallel.tensor_model_parallel_size=8", "parallel.world_size=8"],
            "num_query_groups 4 must be a multiple of parallel.tensor_model_parallel_size 8",
        ),
        (
            ["parallel.tensor_model_parallel_size=2", "model.ffn_hidden_size=127"],
            "ffn_hidden_size 127 must be a multiple of parallel.tensor_model_parallel_size 2",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "model.num_layers=3"],
            "num_layers 3 must be a multiple of parallel.pipeline_model_parallel_size 2",
        ),
        (
            ["parallel.tensor_model_parallel_size=2", "parallel.world_size=3"],
            "world_size 3 must be a multiple of TP x PP = 2",
        ),
        (
            ["parallel.world_size=8", "evaluation.num_prefixes=7"],
            "evaluation.num_prefixes 7 must not be below the data-parallel size 8",
        ),
        (
            ["parallel.world_size=2", "evaluation.interval=4", "evaluation.interval_prefixes=1"],
            "evaluation.interval_prefixes 1 must not be below the data-parallel size 2",
        ),
        (
            ["parallel.expert_model_parallel_size=2", "parallel.world_size=2"],
            "parallel.expert_model_parallel_size 2 needs [model.experts]",
        ),
        (
            ["parallel.expert_model_parallel_size=2", "parallel.world_size=2", *EXPERTS],
            "num_experts 5 must be a multiple of parallel.expert_model_parallel_size 2",
        ),
        (
            ["parallel.expert_model_parallel_size=5", "parallel.world_size=2", *EXPERTS],
            "parallel.expert_model_parallel_size 5 must divide the data-parallel size 2",
        ),
        (["data.global_batch_size=12"], "global_batch_size 12 must be a multiple of"),
        (["data.min_prefix_tokens=65"], "min_prefix_tokens 65 must not exceed"),
        (["data.suffix_tokens=33"], "prefix_tokens + data.suffix_tokens = 97 must not exceed"),
        (["optimizer.warmup_steps=40"], "warmup_steps 40 must be below run.steps 40"),
        (["optimizer.min_lr=1.0"], "min_lr 1.0 must not exceed optimizer.lr 0.0001"),
        (["platform.fp8={}"], 'need platform.kind = "cuda"'),
        (["parallel.sequence_parallel=true"], 'need platform.kind = "cuda"'),
        (["rollout.server=nobody"], 'rollout.server names server "nobody", but recipe has'),
        (['rollout.server=["policy", "nobody"]'], 'rollout.server[1] names server "nobody"'),
        (['rollout.server=["policy", "policy"]'], "rollout.server names a server twice"),
        (["rollout.server=[]"], "rollout.server names no server"),
        (["rollout.sync_timeout_s=1800"], "rollout.sync_timeout_s 1800 must be below 1800"),
        ([SECOND_POLICY], 'what it names, and no other, serves "policy"'),
        (
            [SECOND_POLICY, 'rollout.server=["policy", "second"]', "servers.second.dtype=bfloat16"],
            "rollout.server: dtypes of ['policy', 'second'] differ",
        ),
        (
            [
                SECOND_POLICY,
                'rollout.server=["policy", "second"]',
                "servers.second.max_model_len=8",
            ],
            "servers.second.max_model_len 8 must be at least",
        ),
        (["evaluation.server="], "evaluation.server names server"),
        ([STRANGE_JUDGE], 'judge.criteria[0].server names server "nobody"'),
        (['curriculum.sources=["rewrite", "rollout"]'], "needs a [rewriter] section"),
        ([REWRITER], 'curriculum.sources has no "rewrite"; add it or remove'),
        ([TWO_OF_A_NAME], "judge.criteria names must differ"),
        (["rollout.weight_transfer=nccl"], '"nccl" needs platform.kind = "cuda"'),
        (
            ["rollout.sync_interval=2", "evaluation.interval=3"],
            "evaluation.interval 3 must be a multiple of rollout.sync_interval 2",
        ),
        (["platform.kind=cuda"], '"shared_memory" works on the CPU only; use "nccl"'),
        (['objective.pair_sources=["rewrite"]'], "must be among curriculum.sources"),
    ],
)
def test_each_rule_across_sections_is_kept(sip: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(sip, *overrides)


@pytest.mark.parametrize("section", SIP_SECTIONS)
def test_sip_needs_each_of_its_sections(sip: Path, section: str) -> None:
    blocks = [b for b in SIP.split("\n[") if not b.startswith(section)]
    sip.write_text("\n[".join(blocks))
    assert f'run.task = "sip" needs a [{section}] section' in refusal(sip)


def test_ntp_refuses_what_it_does_not_use(ntp: Path) -> None:
    assert "uses no [judge]; remove it" in refusal(
        ntp,
        "judge={ cache_dir = 'c', criteria = [{ form = 'likelihood', name = 'a', server = 's' }] }",
    )
    assert 'needs objective.name = "nll"' in refusal(ntp, "objective.name=dpo")


def test_override_takes_toml_values_bare_strings_and_new_sections(sip: Path) -> None:
    config = load_config(
        sip,
        (
            "optimizer.lr=1e-5",
            "run.dir=runs/other",
            'curriculum.sources=["suffix", "rewrite", "rollout"]',
            "rewriter.server=judge",
            "rewriter.prompt=p",
            "rewriter.max_tokens=8",
        ),
    )
    assert config.optimizer.lr == 1e-5 and config.run.dir == Path("runs/other")
    assert config.curriculum and config.curriculum.sources == ("suffix", "rewrite", "rollout")
    assert config.rewriter and config.rewriter.max_tokens == 8


def test_later_override_wins(sip: Path) -> None:
    assert load_config(sip, ("run.steps=1", "run.steps=2")).run.steps == 2


@pytest.mark.parametrize("override", ["run.steps", "=5", "run.steps.more=5"])
def test_override_that_is_none_is_refused(sip: Path, override: str) -> None:
    assert f"--set {override!r}" in refusal(sip, override)


def test_absent_and_broken_files_are_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[run")
    assert "broken.toml: not valid TOML" in refusal(tmp_path / "broken.toml")


def test_recipe_cannot_be_changed_once_loaded(sip: Path) -> None:
    config = load_config(sip)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"kind": "connect", "url": "http://h", "model": "m", "tokenizer": Path("t")}
    server = ConnectServer.model_validate(fields | {"api_key_env": "SIP_TEST_KEY"})
    monkeypatch.setenv("SIP_TEST_KEY", "secret")
    assert api_key(server) == "secret"
    monkeypatch.delenv("SIP_TEST_KEY")
    with pytest.raises(ValueError, match="SIP_TEST_KEY is empty; set it"):
        api_key(server)
    assert api_key(ConnectServer.model_validate(fields)) == ""


def test_importing_the_config_imports_no_torch() -> None:
    code = "import sys, megatron_sip.config; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "megatron_sip.config" in loaded
    assert not loaded & {"torch", "megatron", "vllm", "transformers"}


API = 'servers.api={ kind = "connect", url = "http://127.0.0.1:1", model = "m" }'
PROMPTED = '{ form = "pointwise", name = "a", server = "api", prompt = "safety_pointwise_v2"'


def criteria(more: str) -> str:
    return f"judge.criteria=[{PROMPTED}{more} }}]"


def test_a_server_without_tokenizer_is_asked_for_reasoned_answers_only(sip: Path) -> None:
    load_config(sip, (API, criteria(', answer = { kind = "reasoned" }')))
    assert (
        "judge.criteria[0].server sends token ids to servers.api, which has no tokenizer"
        in refusal(sip, API, criteria(""))
    )
    second = 'judge.trust={ interval = 2, second = { form = "likelihood", name = "b", %s } }'
    assert "judge.trust.second.server[0] sends token ids" in refusal(
        sip, API, second % 'server = "api"'
    )
    assert 'judge.trust.second.server[1] names server "nobody"' in refusal(
        sip, second % 'server = ["judge", "nobody"]'
    )


def test_a_limit_of_money_needs_a_price(sip: Path) -> None:
    limit = "judge.limit={ money = 3.5 }"
    assert "judge.limit.money is 3.5, but no server has a price" in refusal(sip, limit)
    priced = API.replace(" }", ', tokenizer = "t", prompt_price = 0.1 }')
    assert load_config(sip, (limit, priced)).judge is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("judge.schedule", '{ name = "adaptive", budget = 0 }'),
        ("judge.schedule", '{ name = "bracket", budget = 0.5 }'),
        ("judge.schedule", '"all_pairs"'),
        ("judge.both_orders", "1.5"),
        ("judge.guards", "{ max_repeated = -0.1 }"),
        ("judge.limit", "{ questions = 0 }"),
        ("judge.trust", "{ interval = 0 }"),
    ],
)
def test_wrong_settings_of_the_judge_are_named(sip: Path, key: str, value: str) -> None:
    assert key in refusal(sip, f"{key}={value}")
