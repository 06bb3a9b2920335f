"""config.json of each family is read as transformers means it, and written as it was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.config_model import Experts, Model, RopeScaling, model_rules
from megatron_sip.convert.families import (
    FAMILIES,
    SpecialIds,
    describe,
    disagreements,
    model_of,
)

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 40, "num_attention_heads": 6,
    "num_query_groups": 2, "max_sequence_length": 64,
}  # fmt: skip
EXPERTS = Experts(num_experts=4, experts_per_token=2)
MODELS = {
    "llama": Model(**SIZES),
    "llama scaled": Model(**SIZES, rope_scaling=RopeScaling(factor=8), rotary_base=500_000),
    "mistral": Model(**SIZES, family="mistral", kv_channels=10),
    "qwen2": Model(**SIZES, family="qwen2", share_embeddings_and_output_weights=True),
    "qwen3": Model(**SIZES, family="qwen3", kv_channels=16, norm_epsilon=1e-6),
    "mixtral": Model(**SIZES, family="mixtral", experts=EXPERTS),
    "qwen3_moe": Model(**SIZES, family="qwen3_moe", experts=EXPERTS.model_copy(
        update={"normalize": False})),
}  # fmt: skip


def described(model: Model, **changed: Any) -> dict[str, Any]:
    found = describe(model, vocab_size=131, special=SpecialIds(1, 2, 0), dtype="float32")
    return json.loads(json.dumps(found)) | changed


@pytest.mark.parametrize("name", MODELS)
def test_description_is_read_back_as_the_model_it_describes(name: str) -> None:
    model = MODELS[name]
    assert not [m for holds, m in model_rules(model) if not holds]
    assert model_of(described(model), source="x") == model.model_copy(update={"vocab_size": 131})


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_and_writes_the_description_as_the_same_model(
    name: str, tmp_path: Path
) -> None:
    import transformers

    model = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(described(model)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [FAMILIES[model.family].architecture]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert model_of(written, source="x") == model.model_copy(update={"vocab_size": 131})


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral"])
def test_absent_keys_mean_what_transformers_takes_them_for(name: str) -> None:
    import transformers

    whole = getattr(transformers, f"{name}Config")().to_dict()
    whole |= {"architectures": None}
    expected = model_of(whole, source="x")
    family = FAMILIES[whole["model_type"]]
    left = {k: v for k, v in whole.items() if k not in (*family.defaults, *family.fixed)}
    if "rope_theta" in family.defaults:
        del left["rope_parameters"]
    assert model_of(left, source="x") == expected


def test_older_keys_of_rope_are_read() -> None:
    old = described(MODELS["llama scaled"])
    del old["rope_parameters"]
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    assert model_of(old, source="x").rope_scaling == RopeScaling(factor=8)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2', which is none of llama"),
        ("llama", {"architectures": ["Odd"]}, "architectures is ['Odd']"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map is {'AutoModel': 'x.Y'}"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ("llama", {"attention_bias": True}, "attention_bias is True, but only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rms_norm_eps": None}, "x has no rms_norm_eps"),
        ("llama", {"hidden_size": "48"}, "hidden_size is '48'"),
        ("llama", {"num_key_value_heads": 4}, "num_attention_heads 6 must be a multiple"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, '"yarn"'),
        ("llama", {"rope_parameters": {"rope_theta": 10.5}}, "rope_theta is 10.5"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "no factor"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ("qwen3_moe", {"norm_topk_prob": None}, "x has no norm_topk_prob"),
    ],
)
def test_what_is_not_known_is_refused_by_key(name: str, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        model_of(described(MODELS[name], **changed), source="x")
    assert says in str(caught.value) and str(caught.value).startswith("x")


def test_window_limits_the_sequence_length_of_mistral() -> None:
    found = model_of(described(MODELS["mistral"], sliding_window=32), source="x")
    assert found.max_sequence_length == 32


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_layers": 3}, "model.num_layers is 3, but must be 2"),
        ({"family": "qwen2"}, "model.family is qwen2, but must be llama"),
        ({"max_sequence_length": 65}, "model.max_sequence_length is 65, but must not exceed 64"),
        ({"norm_epsilon": 1e-4}, "model.norm_epsilon is 0.0001, but must be 1e-05"),
        ({"kv_channels": 10}, "model.kv_channels is 10, but must be 8"),
        ({"rope_scaling": RopeScaling(factor=8)}, "model.rope_scaling is {factor = 8.0"),
        ({"share_embeddings_and_output_weights": True}, "is true, but must be false"),
        ({"vocab_size": 140}, "model.vocab_size is 140, but must be 131"),
        ({}, "model.vocab_size is left out and the tokenizer's 129 is 129, but must be 131"),
    ],
)
def test_recipe_that_differs_from_its_folder_is_told_the_key_and_both_values(
    changed: dict[str, Any], says: str
) -> None:
    folder = model_of(described(MODELS["llama"]), source="x")
    base = {"vocab_size": 131} if changed else {}
    mine = MODELS["llama"].model_copy(update=base | changed)
    (found,) = disagreements(mine, folder, tokenizer_size=129)
    assert says in found


def test_recipe_may_choose_what_does_not_change_the_weights() -> None:
    folder = model_of(described(MODELS["llama"], rms_norm_eps=9.999999747378752e-06), source="x")
    mine = MODELS["llama"].model_copy(
        update={"max_sequence_length": 32, "kv_channels": 8, "init_std": 0.1,
                "make_vocab_size_divisible_by": 64, "recompute_granularity": "full"}
    )  # fmt: skip
    assert not [*disagreements(mine, folder, tokenizer_size=131)]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"family": "mixtral"}, 'model.family "mixtral" needs [model.experts]'),
        ({"experts": EXPERTS}, 'model.family "llama" has no [model.experts]'),
        ({"kv_channels": 7}, "model.kv_channels = 7: the rotary embedding needs heads of an even"),
        ({"family": "qwen2", "kv_channels": 10}, 'kv_channels is 10, but model.family "qwen2"'),
        ({"rope_scaling": RopeScaling(factor=8, high_freq_factor=1)}, "low_freq_factor 1 must"),
        ({"family": "mixtral", "experts": Experts(num_experts=1, experts_per_token=2)},
         "experts_per_token 2 must not exceed"),
        ({"family": "mixtral", "experts": EXPERTS.model_copy(update={"normalize": False})},
         "always normalises"),
    ],
)  # fmt: skip
def test_keys_of_the_model_that_contradict_each_other_are_told(
    changed: dict[str, Any], says: str
) -> None:
    model = MODELS["llama"].model_copy(update=changed)
    assert any(says in message for holds, message in model_rules(model) if not holds)


def test_padding_is_up_to_a_multiple_of_the_divisor_and_tensor_parallelism() -> None:
    model = MODELS["llama"].model_copy(update={"make_vocab_size_divisible_by": 64})
    assert model.padded_vocabulary(131, tensor_parallel=2) == 256
    assert MODELS["llama"].padded_vocabulary(131, tensor_parallel=1) == 131
    assert MODELS["llama"].padded_vocabulary(131, tensor_parallel=4) == 132
