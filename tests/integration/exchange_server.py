"""A real vLLM rollout server and weights to send it, without a trainer. Not a test."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from exchange_helpers import Source

from megatron_sip.config import StartServer
from megatron_sip.rollout.control import ControlClient
from megatron_sip.rollout.shared_memory import SharedMemorySender
from megatron_sip.serving.client import Endpoint
from megatron_sip.serving.fleet import Fleet

SHAPE = {
    "vocab_size": 290, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
BUCKET_BYTES = 100_000  # less than a layer: vLLM holds tensors over several buckets


def llama(seed: int) -> Any:
    """A small Llama with random weights that say something."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Names and tensors as Hugging Face stores them, in the order of the stream."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def logprobs_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probs of token 1.. given those before, nats."""
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


@contextmanager
def policy_fleet(folder: Path, *names: str) -> Iterator[Fleet]:
    """Rollout servers as a run starts them, with random weights, waited for."""
    model_dir = folder / "model"
    model_dir.mkdir(exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (model_dir / "config.json").write_text(json.dumps(config | SHAPE))
    settings = StartServer(
        kind="start", model="policy", max_model_len=256, max_num_seqs=8, num_threads=1
    )
    fleet = Fleet(
        dict.fromkeys(names, settings),
        model_dirs=dict.fromkeys(names, model_dir),
        log_dir=folder,
        platform_kind="cpu",
        policy=names,
        weight_transfer="shared_memory",
    )
    with fleet:
        fleet.wait()
        yield fleet


def sender_to(
    control: ControlClient, tensors: dict[str, torch.Tensor], bucket_bytes: int = BUCKET_BYTES
) -> SharedMemorySender:
    """Connected; close it."""
    sender = SharedMemorySender(Source(tensors), control, bucket_bytes=bucket_bytes)  # pyright: ignore
    sender.connect()
    return sender


def exchange(sender: SharedMemorySender, control: ControlClient, tensors: Any, version: int) -> str:
    """One whole exchange; the published version."""
    sender._source._source.tensors = tensors
    sender.begin()
    control.pause()
    published = sender.send(version, may_equal=False)
    control.resume()
    return published


def post(endpoint: Endpoint, path: str, body: Any = None) -> Any:
    """A plain call of a server's route, as anybody with its key could make it."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body is not None else b""
    request = urllib.request.Request(endpoint.url + path, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read() or b"{}")


def get(endpoint: Endpoint, path: str) -> str:
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    request = urllib.request.Request(endpoint.url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read().decode()


def cached_tokens(endpoint: Endpoint) -> float:
    """Prompt tokens that came from the server's prefix cache since it started."""
    name = "vllm:prefix_cache_hits_total{"
    lines = [line for line in get(endpoint, "/metrics").splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
