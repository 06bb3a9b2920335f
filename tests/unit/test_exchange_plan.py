"""What every recipe's exchange will send is the whole model, as Hugging Face names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sip.convert.families import SpecialIds, describe
from megatron_sip.convert.names import name_table
from megatron_sip.recipe import load_config
from megatron_sip.rollout.bucket_file import plan_buckets

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
VOCAB = 4_099  # no multiple of anything


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_names_and_shapes_are_those_of_the_model_in_bounded_buckets(recipe: Path) -> None:
    config = load_config(recipe)
    table = name_table(config.model, vocab_size=VOCAB)
    stream = [
        (name, torch.bfloat16, tuple(shape))
        for entry in table
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    ]
    special = SpecialIds(eos=0)
    description = describe(config.model, vocab_size=VOCAB, special=special, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**description))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}  # tied ones once
    assert {name: shape for name, _, shape in stream} == expected
    assert len(stream) == len(expected)
    if config.rollout is None:
        return
    limit = config.rollout.bucket_mib * 2**20
    layouts, file_size = plan_buckets(stream, limit)
    assert [p.name for layout in layouts for p in layout.places] == [name for name, _, _ in stream]
    assert all(x.num_bytes <= limit or len(x.places) == 1 for x in layouts)
    assert file_size <= max(x.num_bytes for x in layouts) + 2**20  # the header
