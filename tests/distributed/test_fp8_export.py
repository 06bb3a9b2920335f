"""Quantised folders of models with experts: all matrices but routers and head, to FP8's error."""

from __future__ import annotations

from pathlib import Path

import conversion_cases
import numpy as np
import pytest
import torch
from safetensors import safe_open

from megatron_sip.convert.fp8 import quantise
from megatron_sip.convert.tensor_folder import TensorFolder

STEP = 2**-3  # between neighbours of e4m3, relative
pytestmark = pytest.mark.full


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_quantised_and_keep_their_values(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "wide", tmp_path / "fp8"
    conversion_cases.write_folder(source, name)
    target.mkdir()
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, conversion_cases.VOCAB, 25) for _ in range(20)]
    report = quantise(source, target, calibration=samples[:12], held_out=samples[12:])
    wide = TensorFolder(source)
    layers = {n.removesuffix(".weight") for n, i in wide.tensors.items() if len(i.shape) == 2}
    routers = {layer for layer in layers if layer.endswith(".gate")}
    assert len(routers) == 4
    assert set(report.kept) == routers | {"lm_head", "model.embed_tokens"}
    assert set(report.quantised) == layers - set(report.kept)
    assert sum("experts" in layer for layer in report.quantised) >= 4 * 5 * 3
    with safe_open(target / "model.safetensors", "pt") as opened:
        for layer in report.quantised:
            scale = opened.get_tensor(f"{layer}.weight_scale").float()
            found = opened.get_tensor(f"{layer}.weight").float() * scale
            expected = wide.read(f"{layer}.weight").float()
            # half a step, or half of the smallest step below the smallest normal number
            allowed = torch.maximum(STEP / 2 * expected.abs(), scale * 2**-10)
            assert (found - expected).abs().le(allowed * 1.001).all(), layer
            assert opened.get_tensor(f"{layer}.input_scale") > 0
    assert 0 < report.kl < 0.3
