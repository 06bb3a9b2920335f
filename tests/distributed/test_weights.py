"""First weights, export and checkpoints are the same model in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import tasks
import torch
from workers import Layout, Workers

from megatron_sip.convert.families import SpecialIds, describe
from megatron_sip.convert.tensor_folder import TensorInfo, write_tensors

LAYOUTS = [Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2)]


def assert_same_bytes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_first_weights_are_the_same_bytes_in_every_layout(workers: Workers, tied: bool) -> None:
    one = workers.run(Layout(), tasks.first_weights, tied, 3)[0]
    other_seed = workers.run(Layout(), tasks.first_weights, tied, 4)[0]
    assert np.any(one["first"]["model.embed_tokens.weight"]
                  != other_seed["first"]["model.embed_tokens.weight"])  # fmt: skip
    for layout in LAYOUTS:
        found = workers.run(layout, tasks.first_weights, tied, 3)
        assert_same_bytes(found[0]["first"], one["first"])


def test_no_two_first_matrices_are_alike_and_residual_writers_are_scaled(workers: Workers) -> None:
    weights = workers.run(Layout(), tasks.first_weights, False, 3)[0]["first"]
    matrices = {n: w for n, w in weights.items() if w.ndim == 2}
    assert len({w.ravel()[:64].tobytes() for w in matrices.values()}) == len(matrices)
    model = cases.tiny_model(tied=False)
    for name, weight in matrices.items():
        small = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = model.init_std / (2 * model.num_layers) ** 0.5 if small else model.init_std
        assert weight.std() == pytest.approx(std, rel=0.05), name
    assert all(np.all(w == 1) for w in weights.values() if w.ndim == 1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_metadata_announces_what_iteration_yields_and_twice_yields_the_same(
    workers: Workers, tied: bool
) -> None:
    for layout in (Layout(), Layout(tp=2, pp=2), Layout(dp=2)):
        ranks = workers.run(layout, tasks.first_weights, tied, 3)
        yielded = [(n, "torch.float32", w.shape) for n, w in ranks[0]["first"].items()]
        assert all(r["metadata"] == yielded for r in ranks)
        assert_same_bytes(ranks[0]["second"], ranks[0]["first"])
        assert all(not r["first"] for r in ranks[1:])
        assert ("lm_head.weight" in ranks[0]["first"]) is not tied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_is_the_llama_of_hugging_face(workers: Workers, tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    tokens = np.random.default_rng(0).integers(0, cases.VOCAB, (3, 25))
    model = cases.tiny_model(tied=tied)
    for layout in (Layout(), Layout(tp=2, pp=2)):
        ranks = workers.run(layout, tasks.score, tied, tokens)
        found = next(r for r in ranks if r["logprobs"] is not None)
        np.testing.assert_array_equal(found["copy"], found["logprobs"])
        folder = tmp_path / str(layout)
        folder.mkdir()
        config = describe(model, vocab_size=cases.VOCAB, special=SpecialIds(eos=0), dtype="float32")
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {n: torch.from_numpy(w) for n, w in ranks[0]["weights"].items()}
        infos = [TensorInfo(n, torch.float32, tuple(w.shape)) for n, w in tensors.items()]
        write_tensors(folder, infos, tensors.items())
        llama, report = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            scores = llama(ids).logits[:, :-1].log_softmax(-1)
        expected = scores.gather(-1, ids[:, 1:, None])[..., 0].numpy()
        assert np.abs(expected).mean() > 1  # a model that says something
        np.testing.assert_allclose(found["logprobs"], expected, atol=1e-5, rtol=2e-6)


@pytest.fixture(scope="module")
def saved(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs with one checkpoint each: untied at TP2, tied at DP2, tied at TP2 x PP2."""
    made = {}
    for name, layout, tied in (
        ("TP2", Layout(tp=2), False),
        ("DP2", Layout(dp=2), True),
        ("TP2PP2", Layout(tp=2, pp=2), True),
    ):
        run_dir = tmp_path_factory.mktemp(name)
        made[name] = workers.run(layout, tasks.train_and_save, run_dir, tied)[0] | {
            "run": run_dir, "tied": tied
        }  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("name", "layout"),
    [("TP2", Layout(pp=2)), ("DP2", Layout(tp=2)), ("DP2", Layout(pp=2)), ("TP2PP2", Layout())],
    ids=["TP2 to PP2", "DP2 to TP2", "DP2 to PP2", "TP2PP2 to one"],
)
def test_weights_saved_in_one_layout_load_in_another_bit_for_bit(
    workers: Workers, saved: dict[str, Any], name: str, layout: Layout
) -> None:
    one = saved[name]
    for path in (one["run"], one["folder"]):
        found = workers.run(layout, tasks.load, path, one["tied"], {})
        assert_same_bytes(found[0]["weights"], one["weights"])
        assert all(r["agree"] for r in found)


def test_manifest_names_every_file_and_latest_the_folder(saved: dict[str, Any]) -> None:
    for one in saved.values():
        folder = one["folder"]
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert {*manifest["files"], "manifest.json"} == files
        assert "train_state.json" in files and any(f.endswith(".distcp") for f in files)
        assert (folder.parent / "latest").read_text() == folder.name == "step_00000007"
        state = json.loads((folder / "train_state.json").read_text())
        assert (state["step"], state["consumed_samples"]) == (7, 56)


def damage(folder: Path, how: str) -> str:
    """Harm a copy of a checkpoint; returns what the error must say."""
    victim = next(p for p in folder.iterdir() if p.suffix == ".distcp")
    if how == "flipped byte":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        return "damaged"
    if how == "cut file":
        victim.write_bytes(victim.read_bytes()[:-1])
        return "damaged"
    if how == "file gone":
        victim.unlink()
        return "files missing or unknown"
    if how == "file added":
        (folder / "common.pkl").write_bytes(b"x")
        return "files missing or unknown"
    (folder / "manifest.json").unlink()
    return "without a manifest of ours"


@pytest.mark.parametrize(
    "how", ["flipped byte", "cut file", "file gone", "file added", "no manifest"]
)
def test_damaged_checkpoint_is_refused_before_megatron_loads_it(
    workers: Workers, saved: dict[str, Any], tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "step_00000007"
    shutil.copytree(saved["TP2"]["folder"], folder)
    says = damage(folder, how)
    for answer in workers.run(Layout(tp=2), tasks.load, folder, False, {}):
        assert says in answer["error"] and str(folder) in answer["error"]
        assert not answer["asked"]


@pytest.mark.parametrize(
    "changed", [{"num_layers": 2}, {"vocab_size": 256}, {"tokenizer": "other"}], ids=str
)
def test_checkpoint_of_another_model_is_refused_before_megatron_loads_it(
    workers: Workers, saved: dict[str, Any], changed: dict[str, Any]
) -> None:
    field, value = next(iter(changed.items()))
    for answer in workers.run(Layout(tp=2), tasks.load, saved["TP2"]["run"], False, changed):
        assert f"{field} = " in answer["error"] and str(value) in answer["error"]
        assert not answer["asked"]
