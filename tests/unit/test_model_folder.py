"""Model folders that would run code or be unpickled are refused, whoever they are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from judge_helpers import make_model_folder

from megatron_sip import checkpoint_files
from megatron_sip.model_folder import check_model_folder, check_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    make_model_folder(made)
    if not (made / "config.json").exists():
        (made / "config.json").write_text("{}")
    check_model_folder(made)
    return made


def add_to_json(name: str, **keys: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | keys))

    return change


def touch(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()

    return change


def link_to_code(folder: Path) -> None:
    (folder / "modeling_x.py").symlink_to("/nowhere/modeling_x.py")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (touch("modeling_x.py"), "brings code (modeling_x.py)"),
        (touch("deep/x.PY"), "brings code (deep/x.PY)"),
        (touch("kernel.so"), "brings code (kernel.so)"),
        (link_to_code, "brings code (modeling_x.py)"),
        (add_to_json("config.json", auto_map={"AutoModel": "x.Y"}), "auto_map in config.json"),
        (add_to_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y"]}),
         "auto_map in tokenizer_config.json"),
        (add_to_json("config.json", text_config={"auto_map": {"AutoModel": "x.Y"}}),
         "auto_map in config.json"),
        (add_to_json("processor_config.json", trust_remote_code=True),
         "trust_remote_code in processor_config.json"),
        (touch("pytorch_model.bin"), "holds pickles (pytorch_model.bin)"),
        (touch("original/consolidated.00.pth"), "holds pickles (original/consolidated.00.pth)"),
        (touch("training_args.pt"), "holds pickles (training_args.pt)"),
        (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    ],
)  # fmt: skip
def test_what_would_be_run_or_unpickled_is_named(
    folder: Path, change: Callable[[Path], None], said: str
) -> None:
    change(folder)
    with pytest.raises(ValueError) as error:
        check_model_folder(folder)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("../../secret.safetensors", "files of the folder"), ("model.bin", "files of the folder"),
     ("model-00001.safetensors", "lacks weights")],
)  # fmt: skip
def test_weights_are_safetensors_of_the_folder(folder: Path, name: str, said: str) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=said):
        check_weights(folder)


@pytest.mark.parametrize(
    "names",
    [(".metadata", "common.pt", "__0_0.distcp", "metadata.json"),
     ("latest_checkpointed_iteration.txt", "iter_0000100/.metadata"),
     ("mp_rank_00/model_optim_rng.pt",)],
)  # fmt: skip
def test_a_megatron_checkpoint_of_others_is_refused_with_the_way_in(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"not loaded.*safetensors.*hf-to-megatron"):
        checkpoint_files.find(tmp_path, key="model.init.path")
    with pytest.raises(ValueError, match="neither a checkpoint of ours"):
        checkpoint_files.find(tmp_path / "nothing", key="model.init.path")
