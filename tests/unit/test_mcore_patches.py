"""Each CPU patch is still needed: without it one optimizer step of Megatron-Core fails here.

One process imports everything once and forks for each case; a patch whose omission no longer
breaks anything is to be deleted.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

from megatron_sip import mcore_patches

CASES = (
    "all",
    "_patch_torch_cuda",
    "CudaRequestsToCpu",
    "_patch_random_states",
    "_patch_optimizer_load",
    "_patch_experts",
)
CUDA_CALLS = ("current_device", "set_device", "synchronize", "current_stream", "get_rng_state")
PROBE = """
import contextlib, json, os, socket, sys, warnings
warnings.simplefilter("ignore")
import torch
from megatron_sip import mcore_patches
import megatron.core.optimizer, megatron.core.models.gpt.gpt_model
torch.set_num_threads(1)

def step():
    import numpy as np
    from megatron_sip import (
        forward, learner, model, objectives, optimizer, parallel, platform, rows)
    from megatron_sip.config import Model, Optimizer, Parallel, PlatformConfig
    from megatron_sip.config_model import Experts
    from megatron_sip.config_objective import NllObjective
    from megatron_sip.types import CandidatePool, Pick, SipSample
    on = platform.cpu(PlatformConfig(kind="cpu"))
    settings = Parallel(world_size=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = parallel.initialize(settings, on, seed=1)
    shape = Model(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2,
                  num_query_groups=1, max_sequence_length=8)
    config = model.transformer_config(shape, settings, on)
    module = model.build_module(config, shape, on, vocab_size=16)
    model.initialize_randomly(module, shape, seed=1)
    policy = model.wrap_data_parallel(config, module, Optimizer(lr=0.1), on)
    adam = optimizer.build_optimizer(policy, Optimizer(lr=0.1), on)
    schedule = optimizer.build_scheduler(adam, Optimizer(lr=0.1), steps=2)
    pool = CandidatePool(SipSample(0, 0, 2, np.int32([1, 2]), np.int32([3, 4])), "", (), 0.0)
    batch = rows.make_rows([pool], [(Pick(-2, "target", 0.0, 1.0),)], length=3, pad=0)
    one = learner.Learner(policy, adam, schedule, ranks, on)
    one.learn([batch], NllObjective(name="nll"), reference=None, version=0, fresh_reference=False)
    part = adam.chained_optimizers[0]
    first = next(iter(part.model_param_group_index_map))
    states = part._get_main_param_and_optimizer_states(first)
    with torch.no_grad():
        loaded = {name: value for name, value in states.items() if name != "step"}
        part._set_main_param_and_optimizer_states(first, loaded)
    experts = shape.model_copy(
        update={"family": "mixtral", "experts": Experts(num_experts=4, experts_per_token=2)})
    config = model.transformer_config(experts, settings, on)
    module = model.build_module(config, experts, on, vocab_size=16)
    model.initialize_randomly(module, experts, seed=1)
    forward.token_logprobs(module.eval(), [batch])

def outcome(omitted):
    if omitted == "CudaRequestsToCpu":
        mcore_patches.CudaRequestsToCpu = contextlib.nullcontext
    elif omitted != "all":
        setattr(mcore_patches, omitted, lambda: None)
    try:
        step()
        return "worked"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found = {}
for name in sys.argv[1].split(","):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, outcome(name).encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found[name] = pipe.read()
    os.wait()
for name in sys.argv[2].split(","):
    try:
        getattr(torch.cuda, name)(*([0] if name == "set_device" else []))
        found[name] = "worked"
    except Exception as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""


@functools.cache
def outcomes() -> dict[str, str]:
    """What happened in each case, on a machine that shows no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(CASES), ",".join(CUDA_CALLS)],
        capture_output=True, text=True, timeout=180,
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_step_works_with_all_patches() -> None:
    assert outcomes()["all"] == "worked"


@pytest.mark.parametrize("patch", CASES[1:])
def test_step_fails_without_this_patch_so_it_is_still_needed(patch: str) -> None:
    assert outcomes()[patch] != "worked", f"delete {patch}: Megatron-Core no longer needs it"


@pytest.mark.parametrize("call", CUDA_CALLS)
def test_torch_refuses_this_call_without_a_gpu(call: str) -> None:
    assert outcomes()[call] != "worked"


def test_every_patch_of_the_file_is_tested_here() -> None:
    patches = {n for n in vars(mcore_patches) if n.startswith("_patch")}
    assert patches | {"CudaRequestsToCpu"} == set(CASES[1:])


@pytest.fixture
def fake_patches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Patches that only say they were applied, so that this process stays clean."""
    applied: list[str] = []
    for name in CASES[1:]:

        class Mode:
            def __enter__(self) -> None:
                applied.append("mode")

        stand_in = Mode if name == "CudaRequestsToCpu" else lambda n=name: applied.append(n)
        monkeypatch.setattr(mcore_patches, name, stand_in)
    monkeypatch.setattr(mcore_patches, "_installed", False)
    return applied


def test_install_applies_each_patch_once_however_often_it_is_called(
    fake_patches: list[str],
) -> None:
    mcore_patches.install()
    mcore_patches.install()
    assert sorted(fake_patches) == sorted([*(c for c in CASES if c[0] == "_"), "mode"])


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "1.0"])
def test_untested_megatron_core_is_refused_and_nothing_is_patched(
    version: str, fake_patches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcore_patches.importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"megatron-core {version} is installed"):
        mcore_patches.install()
    assert fake_patches == []
