"""A recipe that starts from a Hugging Face folder is refused before anything starts, by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from judge_helpers import make_model_folder

from megatron_sip import checkpoint_files
from megatron_sip.config_model import Model, RopeScaling
from megatron_sip.convert.checkpoints import write_description, write_tokenizer
from megatron_sip.convert.families import SpecialIds, describe
from megatron_sip.convert.hf_folder import (
    agreement_problems,
    carry_tokenizer,
    find_tokenizer,
    read_model,
    special_ids,
)
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.tokenizer_training import train_tokenizer

MODEL = Model(num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2,
              num_query_groups=1, max_sequence_length=16)  # fmt: skip


def with_tokenizer(path: Path) -> Path:
    make_model_folder(path)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = with_tokenizer(tmp_path / "hf")
    size = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    described = describe(MODEL, vocab_size=size, special=SpecialIds(eos=[1, 2]), dtype="float32")
    (path / "config.json").write_text(json.dumps(described))
    return path


def test_recipe_of_the_folders_sizes_and_tokenizer_agrees(folder: Path) -> None:
    assert not agreement_problems(MODEL, folder, Tokenizer.load(find_tokenizer(folder)))


def test_other_sizes_and_another_tokenizer_are_told_with_both_values(folder: Path) -> None:
    other = with_tokenizer(folder.parent / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    wide = MODEL.model_copy(update={"hidden_size": 16, "kv_channels": 4})
    found = agreement_problems(wide, folder, Tokenizer.load(other / "tokenizer.json"))
    assert len(found) == 2
    assert f"model.hidden_size is 16, but must be 8 in {folder / 'config.json'}" in found[0]
    assert "data.tokenizer has digest" in found[1] and str(folder) in found[1]


def test_folder_with_code_is_refused(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"brings code \(modeling\.py\), which is never run"):
        read_model(folder)


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_broken_description_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_model(folder)


def test_tokenizer_template_and_special_ids_are_carried_over(folder: Path, tmp_path: Path) -> None:
    carry_tokenizer(folder, tmp_path / "new")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "new" / "config.json").exists()
    assert special_ids(tmp_path / "new") == special_ids(folder) == SpecialIds(eos=[1, 2])
    with pytest.raises(ValueError, match=r"has none of tokenizer\.json, tokenizer\.model"):
        find_tokenizer(tmp_path)


def test_manifest_without_the_newer_fields_is_of_a_llama(tmp_path: Path) -> None:
    identity = checkpoint_files.model_identity(MODEL, vocab_size=7, tokenizer_digest="d")
    newer = {"family", "rope_scaling", "experts", "kv_channels"}
    old = {name: value for name, value in identity.items() if name not in newer}
    (tmp_path / "manifest.json").write_text(
        json.dumps({"schema_version": checkpoint_files.SCHEMA_VERSION, "model": old, "files": {}})
    )
    same = MODEL.model_copy(update={"kv_channels": 4})
    for model in (MODEL, same):
        wanted = checkpoint_files.model_identity(model, vocab_size=7, tokenizer_digest="d")
        checkpoint_files.check_identity(tmp_path, wanted)
    changes = {"family": "qwen2", "kv_channels": 6, "rope_scaling": RopeScaling(factor=2)}
    for name, value in changes.items():
        model = MODEL.model_copy(update={name: value})
        wanted = checkpoint_files.model_identity(model, vocab_size=7, tokenizer_digest="d")
        with pytest.raises(ValueError, match=f"was made with {name} = "):
            checkpoint_files.check_identity(tmp_path, wanted)


def test_a_tokenizer_of_ours_is_read_by_transformers_with_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["The state of the Union.\n", "  two  spaces, naïve", "日本 😀\ttab"]
    file, folder = tmp_path / "words.model", tmp_path / "hf"
    train_tokenizer(iter(texts * 50), vocab_size=300, output=file)
    ours = Tokenizer.load(file)
    folder.mkdir()
    write_tokenizer(file, folder)
    write_description(folder, MODEL, vocab_size=300, eos=ours.eod, dtype=torch.float32)
    found = AutoTokenizer.from_pretrained(folder)
    assert (len(found), found.eos_token_id) == (ours.vocab_size, ours.eod)
    for text in texts:
        ids = ours.encode(text)
        assert found.encode(text) == list(ids)
        assert found.decode(ids) == ours.decode(ids)
