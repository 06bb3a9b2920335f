"""Command line and environment of one local vLLM server. Pure: starts nothing, reads nothing.

Keys never stand in the command, which every user of the machine can read: the process that starts
the server adds `VLLM_API_KEY` to the environment. The policy server gets vLLM's control routes
(pause, weight updates), which vLLM's own key check leaves open; `ControlAuth` guards them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from megatron_sip.config import StartServer

PLUGIN = "megatron_sip_weight_transfer"
CONTROL_AUTH = "megatron_sip.serving.control_auth.ControlAuth"
KV_BLOCK_TOKENS = 32
BATCHED_TOKENS = 4096  # of one forward pass

# What torchrun and Megatron-Core set for a trainer rank; a server must not see any of it.
TRAINER_VARIABLES = frozenset({
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("VLLM_API_KEY", "MEGATRON_SIP_CONTROL_KEY"),
})  # fmt: skip
TRAINER_PREFIXES = ("TORCHELASTIC_", "NVTE_")


def server_command(
    settings: StartServer,
    *,
    name: str,
    model_dir: Path,
    port: int,
    platform_kind: Literal["cpu", "cuda"],
    role: Literal["policy", "text"],
    weight_transfer: str | None,
) -> tuple[list[str], dict[str, str]]:
    """Command and environment additions of one server.

    Args:
        name: the server's name in the recipe, also the model name it serves.
        model_dir: Hugging Face folder to serve.
        port: TCP port on 127.0.0.1.
        role: "policy" takes token ids only and has control routes; "text" has a tokenizer.
        weight_transfer: vLLM weight-transfer backend; the policy needs one, a text server has none.
    Returns: (argv, environment variables to set on top of `inherited_environment`).
    Raises: ValueError if role and weight_transfer disagree, or GPUs do not fit the platform.
    """
    if (role == "policy") != (weight_transfer is not None):
        raise ValueError(
            f'servers.{name}: role "{role}" with weight transfer {weight_transfer!r}; '
            "the policy needs a backend, a text server must have none"
        )
    argv = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_dir), "--served-model-name", name),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs)),
        *("--middleware", CONTROL_AUTH),
        *("--disable-fastapi-docs", "--disable-uvicorn-access-log"),
    ]
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_PLUGINS": "",  # an empty list of names: no plugin is loaded
    }
    if role == "policy":
        config = json.dumps({"backend": weight_transfer})
        argv += ["--enable-scale-out", "--skip-tokenizer-init", "--weight-transfer-config", config]
        argv += ["--load-format", "dummy"]  # the first weight exchange brings the weights
        env |= {"VLLM_PLUGINS": PLUGIN, "VLLM_SERVER_DEV_MODE": "1"}
    else:
        argv += ["--load-format", "safetensors"]  # never a pickle
    platform_argv, platform_env = (_cpu if platform_kind == "cpu" else _cuda)(settings, name)
    return argv + platform_argv, env | platform_env


def _cpu(settings: StartServer, name: str) -> tuple[list[str], dict[str, str]]:
    """CPU part: exactly num_threads OpenMP threads, bound to no core.

    vLLM by default binds each server's threads to the first cores, so that two servers fight for
    the same ones. Waiting threads sleep: where threads outnumber cores, spinning made requests 20
    to 50 times slower. The worker runs inside the engine process (no multiprocessing): one start-up
    and 0.7 GiB less, no shared memory left by a kill. TorchDynamo is off because vLLM compiles
    parts of its sampler even in eager mode: about 20 s of the first request. Prompts are never
    prefilled in chunks: vLLM would rewind the seeded generator of such a request, which a CPU
    generator cannot, and the engine would die.
    """
    if settings.gpus:
        raise ValueError(
            f'servers.{name}.gpus is {list(settings.gpus)}, but platform.kind is "cpu"; remove it'
        )
    budget = max(settings.max_model_len, BATCHED_TOKENS)
    argv = [
        *("--enforce-eager", "--block-size", str(KV_BLOCK_TOKENS)),
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(budget)),
    ]
    return argv, {
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }


def _cuda(settings: StartServer, name: str) -> tuple[list[str], dict[str, str]]:
    """CUDA part: the server's own devices; tensor parallel over all of them."""
    if not settings.gpus:
        raise ValueError(
            f'servers.{name}.gpus is empty, but platform.kind is "cuda"; list its devices'
        )
    return ["--tensor-parallel-size", str(len(settings.gpus))], {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, settings.gpus)),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def inherited_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment without what torchrun, Megatron-Core and keys put there."""
    return {
        key: value
        for key, value in environment.items()
        if key not in TRAINER_VARIABLES and not key.startswith(TRAINER_PREFIXES)
    }
