"""Parameters have one name in every layout, also where Transformer Engine groups experts."""

from types import SimpleNamespace

import pytest

from megatron_sip.config_model import Experts, Model
from megatron_sip.convert.names import held_name, name_table, replica_of
from megatron_sip.model import global_name

MODEL = Model(num_layers=4, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2,
              num_query_groups=1, max_sequence_length=8, family="qwen3_moe",
              experts=Experts(num_experts=6, experts_per_token=2))  # fmt: skip
LAYER = SimpleNamespace(layer_number=3, mlp=SimpleNamespace(local_expert_indices=[4, 5]))
MODULE = SimpleNamespace(decoder=SimpleNamespace(layers=[LAYER]))  # of the second stage


@pytest.mark.parametrize(
    ("local", "name"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.0.mlp.router.weight", "decoder.layers.2.mlp.router.weight"),
        (
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight",
            "decoder.layers.2.mlp.experts.local_experts.5.linear_fc2.weight",
        ),
        (
            "decoder.layers.0.mlp.experts.linear_fc1.weight0",
            "decoder.layers.2.mlp.experts.linear_fc1.weight4",
        ),
    ],
)
def test_numbers_are_those_of_the_whole_model(local: str, name: str) -> None:
    assert global_name(local, MODULE) == name


def test_each_expert_belongs_to_the_replica_that_holds_it() -> None:
    table = name_table(MODEL, vocab_size=16)
    grouped = {
        f"decoder.layers.2.mlp.experts.linear_fc{n}.weight{j}" for n in (1, 2) for j in (4, 5)
    }
    found = [e for e in table if any(name in grouped for name in e.megatron)]
    assert {held_name(e, grouped) for e in found} == grouped
    assert {replica_of(e, MODEL, expert_size=3) for e in found} == {2}
    assert {replica_of(e, MODEL, expert_size=1) for e in table} == {0}
    assert {replica_of(e, MODEL, expert_size=6) for e in table} == set(range(6))
