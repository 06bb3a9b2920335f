"""Sizes that --explain states, against published counts and counts by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.config import Config, Model, Parallel
from megatron_sip.config_model import Experts
from megatron_sip.convert.families import SpecialIds, describe
from megatron_sip.explain.files import checkpoint_bytes, checkpoints_kept, pool_bytes, run_files
from megatron_sip.explain.memory import activation_bytes, exchange_bytes, rank_memory
from megatron_sip.explain.numbers import bytes_text, count_text, flops_text
from megatron_sip.explain.parameters import count_parameters
from megatron_sip.explain.plan import describe_platform
from megatron_sip.explain.ranks import all_ranks, place
from megatron_sip.explain.samples import Lengths
from megatron_sip.explain.shapes import Shape, folder_shape, policy_shape
from megatron_sip.explain.workload import Workload, plans, workload
from megatron_sip.recipe import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = Shape(2, 8, 16, 4, 2, 2, 10, tied=False)
MODEL = Model(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4,
              num_query_groups=2, max_sequence_length=32)  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2_135M = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip
GPT_OSS_120B = {
    "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880,
    "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 201088, "num_local_experts": 128, "num_experts_per_tok": 4,
}  # fmt: skip


def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)


def work_of(config: Config) -> Workload:
    return workload(config, plans(config)[-1], describe_platform(config))


def folder(path: Path, fields: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_shape_counts_by_hand() -> None:
    # a layer: 8 x (8 + 4 + 4 + 8) = 192 for attention, 3 x 8 x 16 = 384 for the MLP
    assert SMALL.matrices_per_token == 2 * (192 + 384) == 1152
    assert SMALL.active_parameters == 1152 + 10 * 8
    assert SMALL.parameters == 1152 + 2 * 80 + 5 * 8 == 1352
    assert dataclasses.replace(SMALL, tied=True).parameters == 1352 - 80
    experts = dataclasses.replace(SMALL, num_experts=4, experts_per_token=2)
    assert experts.matrices_per_token == 2 * (192 + 32 + 2 * 384)
    assert experts.parameters == 2 * (192 + 32 + 4 * 384) + 160 + 40


@pytest.mark.parametrize(
    ("fields", "published"), [(LLAMA_8B, 8_030_261_248), (SMOLLM2_135M, 134_515_008)]
)
def test_dense_models_have_their_published_number_of_parameters(
    tmp_path: Path, fields: dict[str, Any], published: int
) -> None:
    assert folder_shape(folder(tmp_path, fields)).parameters == published


def test_model_of_experts_is_within_a_hundredth_of_what_is_published(tmp_path: Path) -> None:
    shape = folder_shape(folder(tmp_path, GPT_OSS_120B))
    assert shape.parameters == pytest.approx(116.8e9, rel=0.01)
    assert shape.active_parameters == pytest.approx(5.13e9, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json is not there"),
        ("{", "is not valid JSON"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is none of"),
        ('{"model_type": "llama", "num_attention_heads": 2}', "has no 'num_hidden_layers'"),
    ],
)
def test_unknown_size_says_why(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        folder_shape(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_policy_counts_the_same_by_part_by_shape_and_as_its_export(
    tmp_path: Path, tied: bool
) -> None:
    model = MODEL.model_copy(update={"share_embeddings_and_output_weights": tied})
    shape = policy_shape(model, vocab_size=10)
    whole = count_parameters(model, Parallel(world_size=1), vocab_size=10)
    assert sum(whole.total.values()) == shape.parameters == 1352 - 80 * tied
    export = describe(model, vocab_size=10, special=SpecialIds(eos=2), dtype="float32")
    assert folder_shape(folder(tmp_path, export)) == shape


def test_stages_hold_their_layers_and_slices_their_share() -> None:
    parallel = Parallel(world_size=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    first, last = count_parameters(MODEL, parallel, vocab_size=10).per_rank
    assert first == {
        "embedding": 40, "attention": 96, "mlp": 192, "experts": 0, "norms": 16, "head": 0
    }  # fmt: skip
    assert last == {
        "embedding": 0, "attention": 96, "mlp": 192, "experts": 0, "norms": 24, "head": 40
    }  # fmt: skip


def test_ranks_share_experts_and_each_holds_the_rest() -> None:
    model = MODEL.model_copy(
        update={"family": "mixtral", "experts": Experts(num_experts=4, experts_per_token=2)}
    )
    spread = Parallel(world_size=4, expert_model_parallel_size=2)
    found = count_parameters(model, spread, vocab_size=10)
    (rank,) = found.per_rank
    assert rank["experts"] * 2 == found.total["experts"] == 4 * 2 * 384
    assert rank["mlp"] == found.total["mlp"] == 2 * 4 * 8  # the routers
    for part in ("embedding", "attention", "norms", "head"):
        assert rank[part] == found.total[part]


def test_last_of_several_stages_holds_a_second_copy_of_a_tied_matrix() -> None:
    tied = MODEL.model_copy(update={"share_embeddings_and_output_weights": True})
    one = count_parameters(tied, Parallel(world_size=1), vocab_size=10)
    two = count_parameters(
        tied, Parallel(world_size=2, pipeline_model_parallel_size=2), vocab_size=10
    )
    assert one.per_rank[0]["head"] == 0 and two.per_rank[1]["head"] == 80
    assert one.total == two.total and sum(one.total.values()) == 1272


def test_memory_of_the_quickstart_by_hand() -> None:
    config = recipe("quickstart")
    parameters = count_parameters(config.model, config.parallel, vocab_size=4096)
    (found,) = rank_memory(
        config, parameters, work_of(config), policy_shape(config.model, vocab_size=4096)
    )
    count = 5_048_576
    assert found.weights == found.gradients == found.start_policy == 4 * count
    assert found.optimizer == 8 * count // 2 and found.reference == 0
    # 4 rows of 63 + 7 x 32 positions, 4 layers of 6h + 4d + 4q + heads + 5f, mask, norm, the head
    layer = 6 * 256 + 4 * 32 + 4 * 256 + 8 + 5 * 704
    assert found.activations == 4 * 287 * 4 * (4 * layer + 287 + 3 * 256 + 6)
    assert found.total == found.steady + found.activations + found.exchange


def test_memory_in_bf16_has_main_weights_in_the_sharded_state() -> None:
    config = recipe("continual_quality")
    parameters = count_parameters(config.model, config.parallel, vocab_size=32_000)
    (found,) = rank_memory(
        config, parameters, work_of(config), policy_shape(config.model, vocab_size=32_000)
    )
    count = 1_364_297_728
    assert sum(parameters.total.values()) == count
    assert (found.weights, found.gradients) == (2 * count, 4 * count)
    assert found.optimizer == 12 * count // 4


def test_first_stage_keeps_a_micro_batch_for_each_stage_behind_it() -> None:
    config = recipe("continual_quality", "parallel.pipeline_model_parallel_size=4")
    shape, work = policy_shape(config.model, vocab_size=32_000), work_of(config)
    kept = [activation_bytes(config, work, shape, stage=stage) for stage in range(4)]
    assert kept[0] == 4 * kept[2] // 2 and kept[1] == 3 * kept[2] // 2
    few = dataclasses.replace(work, micro_batches=2)
    assert activation_bytes(config, few, shape, stage=0) == kept[2]


def test_staged_run_holds_a_reference_beside_the_start_policy() -> None:
    staged = (
        'curriculum={ kind = "staged", sources = ["suffix", "rewrite", "rollout"], nll_tokens = 9 }'
    )
    config = recipe("quickstart", staged)
    parameters = count_parameters(config.model, config.parallel, vocab_size=4096)
    shape = policy_shape(config.model, vocab_size=4096)
    (found,) = rank_memory(config, parameters, work_of(config), shape)
    assert found.reference == found.start_policy > 0


@pytest.mark.parametrize(
    ("overrides", "copies", "folders"),
    [
        ([], 0, 1),
        (['reference={ kind = "rollout" }'], 0, 1),
        # kept after 20 and 40 of 40 steps: compared with those of step 15 and 35
        (['reference={ kind = "snapshot", interval = 5 }'], 1, 3),
        (['objective={ name = "simpo" }'], 0, 1),
    ],
)
def test_memory_and_files_of_each_kind_of_reference(
    overrides: list[str], copies: int, folders: int
) -> None:
    config = recipe("quickstart", "run.steps=40", "checkpoint.interval=20", *overrides)
    parameters = count_parameters(config.model, config.parallel, vocab_size=4096)
    shape, work = policy_shape(config.model, vocab_size=4096), work_of(config)
    (found,) = rank_memory(config, parameters, work, shape)
    assert found.reference == copies * found.start_policy
    files = {f.path: f for f in run_files(config, parameters, work, Lengths(64.0, {}, {}, {}))}
    assert files["checkpoints/weights_*/"].count == folders


def test_exchange_needs_a_bucket_and_its_file_or_packed_buffers() -> None:
    quickstart, cuda = recipe("quickstart"), recipe("continual_quality")
    small = policy_shape(quickstart.model, vocab_size=4096)
    assert exchange_bytes(quickstart, small) == 2 * 4 * 5_048_576  # smaller than a bucket
    large = policy_shape(cuda.model, vocab_size=32_000)
    assert exchange_bytes(cuda, large) == 3 * (256 * 2**20 + 2 * 32_000 * 2048)


def test_ranks_are_laid_out_tensor_then_data_then_pipeline() -> None:
    parallel = Parallel(world_size=8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    found = [place(rank, parallel) for rank in range(8)]
    assert found[:4] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert found[4:] == [(0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)]


def test_duties_stand_with_the_right_ranks() -> None:
    config = recipe(
        "quickstart", "parallel.world_size=4", "parallel.pipeline_model_parallel_size=2"
    )
    duties = [" ".join(r.duties) for r in all_ranks(config)]
    assert "starts and ends the servers" in duties[0] and "sends the weights" in duties[0]
    assert ["I/O" in d for d in duties] == [True, True, False, False]
    assert ["loss" in d for d in duties] == [False, False, True, True]
    spread = recipe(
        "quickstart", "parallel.world_size=4", "parallel.expert_model_parallel_size=2",
        'model.family="mixtral"', "model.experts.num_experts=6",
        "model.experts.experts_per_token=2", "data.micro_batch_size=2",
    )  # fmt: skip
    held = [r.duties[0] for r in all_ranks(spread)]
    assert held == ["experts 0-2", "experts 3-5", "experts 0-2", "experts 3-5"]


def test_files_are_counted_and_sized() -> None:
    config = recipe("quickstart", "run.steps=50")
    parameters = count_parameters(config.model, config.parallel, vocab_size=4096)
    assert checkpoint_bytes(config, parameters) == 16 * 5_048_576
    lengths = Lengths(64.0, {}, {}, {})
    # 80 candidates of 32 tokens, 64 with log-probs, 8 prefixes, 160 verdicts, 2 shards
    expected = 80 * 32 * 8 + 64 * 32 * 4 + 8 * 64 * 8 + 160 * 40 + 2 * 8000
    assert pool_bytes(config, work_of(config), lengths) == expected
    files = {f.path: f for f in run_files(config, parameters, work_of(config), lengths)}
    assert files["checkpoints/step_*/"].count == 2  # after 48 and at the end
    assert files["checkpoints/weights_*/"].bytes_total == 4 * 5_048_576
    assert files["pools/step_*.parquet"].bytes_total == 50 * expected
    assert files["logs/*.log"].bytes_total is None


@pytest.mark.parametrize(
    ("steps", "interval", "keep_last", "keep_every", "kept"),
    [(50, 20, 2, None, 2), (50, 20, 1, 20, 3), (50, 20, 9, None, 3), (40, 20, 1, 30, 1)],
)
def test_kept_checkpoints_are_the_last_and_the_multiples(
    steps: int, interval: int, keep_last: int, keep_every: int | None, kept: int
) -> None:
    overrides = [f"run.steps={steps}", f"checkpoint.interval={interval}"]
    overrides.append(f"checkpoint.keep_last={keep_last}")
    if keep_every:
        overrides.append(f"checkpoint.keep_every={keep_every}")
    assert checkpoints_kept(recipe("quickstart", *overrides)) == kept


def test_numbers_are_short() -> None:
    assert (bytes_text(1536), bytes_text(12), bytes_text(0)) == ("1.50 KiB", "12 B", "-")
    assert (bytes_text(None), flops_text(None), flops_text(2.5e12)) == (
        "not known", "unknown", "2.50 TFLOP",
    )  # fmt: skip
    assert (count_text(0), count_text(1234.6), count_text(0.25)) == ("-", "1,235", "0.2")
