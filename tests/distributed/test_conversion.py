"""Hugging Face -> Megatron -> Hugging Face is the same bytes and the same model, for every family
and in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import conversion_cases
import conversion_tasks
import numpy as np
import pytest
import torch
from workers import Layout, Workers

from megatron_sip.convert.hf_folder import read_model
from megatron_sip.convert.tensor_folder import TensorFolder

MORE = [Layout(), Layout(tp=2), Layout(pp=2)]
SPREAD = Layout(dp=2, ep=2)
LAYOUTS = [Layout(tp=2, pp=2), SPREAD, *(pytest.param(x, marks=pytest.mark.full) for x in MORE)]
TOKENS = np.random.default_rng(0).integers(0, conversion_cases.VOCAB, (3, 25))


def fitting(folders: dict[str, Path], layout: Layout) -> dict[str, Path]:
    """Those whose experts, if they are to be spread, can be."""
    experts = {name: read_model(folder).experts for name, folder in folders.items()}
    return {n: folders[n] for n, e in experts.items()
            if layout.ep == 1 or (e is not None and e.num_experts % layout.ep == 0)}  # fmt: skip


def bits(folder: Path) -> dict[str, bytes]:
    opened = TensorFolder(folder)
    return {n: opened.read(n).contiguous().view(torch.uint8).numpy().tobytes()
            for n in sorted(opened.tensors)}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {n: conversion_cases.write_folder(root / n, n) for n in conversion_cases.CASES}


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Log-probs by transformers."""
    ids = torch.from_numpy(TOKENS)
    found = {}
    for name in conversion_cases.CASES:
        with torch.no_grad():
            scores = conversion_cases.reference(name)(ids).logits[:, :-1].log_softmax(-1)
        found[name] = scores.gather(-1, ids[:, 1:, None])[..., 0].numpy()
        assert found[name].std() > 0.5  # a model that says something
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_folder_read_by_slices_is_the_same_model_and_exports_the_same_bytes(
    workers: Workers, folders: dict[str, Path], expected: dict[str, np.ndarray], layout: Layout
) -> None:
    folders = fitting(folders, layout)
    divisor = 16 if layout.pp == 2 else 1
    ranks = workers.run(layout, conversion_tasks.read_folders, folders, TOKENS, divisor)
    for name, folder in folders.items():
        exported = {n: w.tobytes() for n, w in sorted(ranks[0][name]["weights"].items())}
        assert exported == bits(folder), name
        for rank in ranks:
            if rank[name]["logprobs"] is not None:
                np.testing.assert_allclose(
                    rank[name]["logprobs"], expected[name], atol=1e-4, rtol=0, err_msg=name
                )
        assert any(rank[name]["logprobs"] is not None for rank in ranks)


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders as checkpoints of ours, by the functions of the command line."""
    root = tmp_path_factory.mktemp("megatron")
    found = {name: root / name for name in folders}
    conversion_cases.convert("huggingface_to_megatron", folders, found, "dtype=None")
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_converted_checkpoint_is_the_same_bytes_in_every_layout(
    workers: Workers, folders: dict[str, Path], made: dict[str, Path], layout: Layout
) -> None:
    folders = fitting(folders, layout)
    ranks = workers.run(layout, conversion_tasks.read_checkpoints, folders, made)
    for name, folder in folders.items():
        exported = {n: w.tobytes() for n, w in sorted(ranks[0][name].items())}
        assert exported == bits(folder), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_checkpoint_of_any_layout_becomes_the_folder_it_came_from(
    workers: Workers, folders: dict[str, Path], made: dict[str, Path],
    expected: dict[str, np.ndarray], layout: Layout, tmp_path: Path,
) -> None:  # fmt: skip
    folders = fitting(folders, layout)
    saved = {name: tmp_path / "megatron" / name for name in folders}
    for name, run in saved.items():  # beside the weights: the recipe and the tokenizer
        shutil.copytree(made[name], run, ignore=shutil.ignore_patterns("checkpoints"))
    workers.run(layout, conversion_tasks.save_folders, folders, tmp_path / "megatron")
    for run in saved.values():
        (run / "checkpoints" / "latest").write_text("weights_00000000")
    written = {name: tmp_path / "hf" / name for name in folders}
    conversion_cases.convert(
        "megatron_to_huggingface", saved, written, "dtype=None, tokenizer=None"
    )
    for name, folder in folders.items():
        assert bits(written[name]) == bits(folder), name
        assert read_model(written[name]) == read_model(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (written[name] / file).read_bytes() == (folder / file).read_bytes()
        ids = [json.loads((f / "config.json").read_text())["eos_token_id"]
               for f in (written[name], folder)]  # fmt: skip
        assert ids[0] == ids[1] == 0
        np.testing.assert_array_equal(by_transformers(written[name]), expected[name], err_msg=name)


def by_transformers(folder: Path) -> np.ndarray:
    """Log-probs of a folder that transformers loads as it stands."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    odd = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not [key for key in odd if report[key]]
    ids = torch.from_numpy(TOKENS)
    with torch.no_grad():
        scores = model(ids).logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, ids[:, 1:, None])[..., 0].numpy()
