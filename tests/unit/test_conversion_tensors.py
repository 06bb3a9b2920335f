"""safetensors written here are those of the library; what is wrong with a folder is told by name.
"""  # fmt: skip

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sip.config_model import Model
from megatron_sip.convert.load import problems
from megatron_sip.convert.names import name_table
from megatron_sip.convert.tensor_folder import TensorFolder, TensorInfo, write_tensors

MODEL = Model(num_layers=1, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2,
              num_query_groups=1, max_sequence_length=16)  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)


def tensors_of(model: Model = MODEL) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(shape, generator=GENERATOR)
        for entry in name_table(model, vocab_size=7)
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    }


def infos_of(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> list[TensorInfo]:
    return [TensorInfo(n, dtype, tuple(t.shape)) for n, t in tensors.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [1, 700, 10**9])
def test_shards_and_index_are_what_the_library_reads(
    tmp_path: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    tensors = tensors_of()
    infos = infos_of(tensors, dtype)
    total = write_tensors(tmp_path, infos, tensors.items(), shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    read = {k: v for file in files for k, v in load_file(file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t.to(dtype)) for n, t in tensors.items())
    assert total == sum(t.numel() * t.itemsize for t in read.values())
    if shard_bytes == 10**9:
        assert [f.name for f in files] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {n: f.name for f in files for n in load_file(f)}
    assert all(f.name == f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
               for i, f in enumerate(files))  # fmt: skip
    opened = TensorFolder(tmp_path)
    assert opened.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(opened.read(name), tensor.to(dtype))
        piece = slice(1, 3)
        assert torch.equal(opened.read(name, piece), tensor.to(dtype)[piece])
        if tensor.dim() == 2:
            assert torch.equal(opened.read(name, piece, dim=1), tensor.to(dtype)[:, piece])


def test_tensors_other_than_announced_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of()
    with pytest.raises(ValueError, match=r"came where model\.embed_tokens"):
        write_tensors(tmp_path, infos_of(tensors), reversed(tensors.items()))
    with pytest.raises(ValueError, match=r"lm_head\.weight was not announced"):
        write_tensors(tmp_path, infos_of(tensors)[:-1], tensors.items())
    with pytest.raises(ValueError, match="nothing of shape"):
        write_tensors(tmp_path, infos_of(tensors), [*tensors.items()][:-1])


def test_number_too_large_for_float16_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([70_000.0])}
    with pytest.raises(ValueError, match="a is too large for float16"):
        write_tensors(tmp_path, infos_of(tensors, torch.float16), tensors.items())


def folder_with(tmp_path: Path, **changed: torch.Tensor | None) -> Path:
    tensors = tensors_of() | {n.replace("__", "."): t for n, t in changed.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    return tmp_path


def problems_of(folder: Path, model: Model = MODEL) -> list[str]:
    return [*problems(TensorFolder(folder), name_table(model, vocab_size=7), model, folder)]


def test_missing_unknown_and_misshapen_parameters_are_told_by_name(tmp_path: Path) -> None:
    assert not problems_of(folder_with(tmp_path))
    folder_with(
        tmp_path, model__norm__weight=None, model__odd__bias=torch.zeros(1),
        model__layers__0__mlp__down_proj__weight=torch.zeros(8, 13),
    )  # fmt: skip
    missing, unknown, shape = problems_of(tmp_path)
    assert "lacks parameters of a llama model: model.norm.weight" in missing
    assert "does not have: model.odd.bias" in unknown
    assert "model.layers.0.mlp.down_proj.weight has shape (8, 13), but config.json says" in shape


def test_biases_of_another_family_are_unknown(tmp_path: Path) -> None:
    qwen = MODEL.model_copy(update={"family": "qwen2"})
    save_file(tensors_of(qwen), tmp_path / "model.safetensors")
    assert not problems_of(tmp_path, qwen)
    (found,) = problems_of(tmp_path)
    assert "model.layers.0.self_attn.q_proj.bias" in found


def test_what_follows_from_other_tensors_may_be_there(tmp_path: Path) -> None:
    tied = MODEL.model_copy(update={"share_embeddings_and_output_weights": True})
    folder_with(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    assert not problems_of(tmp_path, tied)  # lm_head.weight, too


def test_folder_without_safetensors_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks weights: model\.safetensors"):
        TensorFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which would have to be unpickled"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("[]", "is no index of safetensors"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "is not a file of its folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "lacks weights: x.safetensors"),
    ],
)
def test_wrong_index_is_refused(tmp_path: Path, index: str, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=says):
        TensorFolder(tmp_path)


def test_cut_file_is_refused_by_name(tmp_path: Path) -> None:
    file = folder_with(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        TensorFolder(tmp_path)


def test_quantised_tensor_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a is of I8"):
        TensorFolder(tmp_path)
