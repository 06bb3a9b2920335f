"""A weight exchange over shared memory against the speed of a plain copy; and the plan for H100.

Each model's tensors stand in this process's memory, as a trainer's do. Measured apart, each one
pass over all of them, copy and transport turn and turn about, then the others:

    copy       tensor by tensor into memory that is there: the bandwidth of this machine
    transport  into the two slots of the exchange, bucket by bucket, mapped again by a reader
    digest     xxh3 of every tensor, as each side makes it
    apply      what a server does besides: a copy out of the mapped bucket into its parameters
    pause      the whole of `SharedMemorySender.send` to a receiver in this process: transport,
               both digests and apply, overlapped

All of it on one thread. The ratio `memcpy_share` is the bandwidth of transport over that of the
copy, of the worst model. The smallest model is also sent to a real vLLM server, over HTTP.

The plan for H100 is computed and not measured: bytes over bandwidth of what carries them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_sip.benchmark.measure import interleaved_seconds
from megatron_sip.config import StartServer
from megatron_sip.rollout.bucket_file import Layout, MappedBucket, Slot, plan_buckets
from megatron_sip.rollout.control import ControlClient
from megatron_sip.rollout.digest import tensor_digest
from megatron_sip.rollout.ledger import Announcement, UpdateLedger
from megatron_sip.rollout.receiver import Receiver
from megatron_sip.rollout.shared_memory import SharedMemorySender
from megatron_sip.rollout.weight_source import TensorInfo
from megatron_sip.serving.client import Endpoint
from megatron_sip.serving.fleet import Fleet

BUCKET_BYTES = 256 * 2**20  # rollout.bucket_mib as it is by itself
REPETITIONS = {"10m_fp32": 51, "135m_fp32": 7, "1b_bf16": 5}  # about as many bytes
EXCHANGES = 5  # with the real server
# hidden size, feed-forward size, layers, heads, KV heads, vocabulary; tied embeddings
MODELS = {
    "10m_fp32": ((256, 768, 9, 8, 4, 8_192), torch.float32),
    "135m_fp32": ((576, 1_536, 30, 9, 3, 49_152), torch.float32),  # SmolLM2-135M
    "1b_bf16": ((2_048, 8_192, 16, 32, 8, 32_000), torch.bfloat16),
}
REAL = "10m_fp32"
H100_MODELS = {"1B": 1.24e9, "8B": 8.0e9, "70B": 70.6e9}  # parameters, sent in bf16
# bytes/s: NVLink 4 one way; PCIe 5 x16; one 400 Gb/s network card; HBM3, read and written once
H100_LINKS = {"nvlink": 450e9, "pcie": 64e9, "network": 50e9, "apply": 3.35e12 / 2}

Shape = tuple[int, int, int, int, int, int]


def run() -> dict[str, Any]:
    """The benchmark; about 6 GiB of memory, and a few minutes on two cores.

    Raises: OSError if /dev/shm has no room for two buckets; ServerFailed if vLLM does not come up.
    """
    results: dict[str, Any] = {}
    shares = []
    torch.set_num_threads(1)  # as a trainer's rank; a second one waits wherever a core is taken
    for name, (shape, dtype) in MODELS.items():
        found, share = _measure(shape, dtype, repetitions=REPETITIONS[name])
        results |= {f"{name}_{key}": value for key, value in found.items()}
        shares.append(share)
    shape, dtype = MODELS[REAL]
    results |= {f"{REAL}_vllm_{key}": value for key, value in _real_server(shape, dtype).items()}
    results |= {f"computed_h100_{name}": s for name, s in h100_floor().items()}
    settings = {
        "parameters": {n: sum(t.numel() for t in _empty(*m).values()) for n, m in MODELS.items()},
        "bucket_mib": BUCKET_BYTES // 2**20,
        "repetitions": REPETITIONS,
        "threads": torch.get_num_threads(),
        "plan": "computed_h100_*: bytes / bandwidth of one link or of memory, not measured",
    }
    ratios = {"memcpy_share": min(shares)}
    return {"name": "weight-sync", "settings": settings, "results": results, "ratios": ratios}


def h100_floor() -> dict[str, float]:
    """Least seconds in which bf16 weights can cross one link, or be written where they are used.

    The exchange gathers layer by layer on rank 0 and broadcasts once to all workers, so its floor
    is the slowest link on the way: NVLink inside a node, the network between nodes.
    """
    return {
        f"{model}_{link}_s": 2 * parameters / bandwidth
        for model, parameters in H100_MODELS.items()
        for link, bandwidth in H100_LINKS.items()
    }


def _empty(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of a Llama without memory, by Hugging Face name, in the order of the stream."""
    hidden, ffn, layers, heads, groups, vocab = shape
    kv = hidden // heads * groups
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        sizes |= {f"model.layers.{i}.{part}.weight": size for part, size in layer.items()}
    sizes["model.norm.weight"] = (hidden,)
    return {n: torch.empty(s, dtype=dtype, device="meta") for n, s in sizes.items()}


class _Source:
    """Tensors as the trainer's weight source yields them; changed a little for each pass."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def metadata(self) -> list[TensorInfo]:
        return [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.tensors["model.norm.weight"].add_(0.01)
        return iter(self.tensors.items())


def _tensors(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of 0.02 on average; a pattern of 2^20 values, again and again."""
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(1)).mul_(0.02).to(dtype)
    made = {}
    for name, empty in _empty(shape, dtype).items():
        repeats = -(-empty.numel() // len(pattern))
        made[name] = pattern.repeat(repeats)[: empty.numel()].view(empty.shape).clone()
    return made


def _scratch(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Memory to copy each tensor to; much larger than caches, and shared by those far apart."""
    largest = max(tensor.nbytes for tensor in tensors.values())
    memory, at = torch.zeros(largest + 2 * BUCKET_BYTES, dtype=torch.uint8), 0
    places = {}
    for name, tensor in tensors.items():
        at = 0 if at + tensor.nbytes > len(memory) else at
        places[name] = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        at += tensor.nbytes
    return places


class _InProcess:
    """In the place of `ControlClient`: one receiver in this process."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self.parameters = parameters
        self.endpoints = (Endpoint("receiver", "http://127.0.0.1:1", "policy"),)

    def world_sizes(self) -> list[int]:
        return [1]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        root = Path(init_info["root"])
        self.receiver = Receiver(root, server="receiver", rank=0, ledger=UpdateLedger())

    def start_weight_update(self) -> None:
        self.receiver.start()

    def update_weights(self, info: dict[str, Any]) -> None:
        bucket = Announcement(**info["bucket"])
        self.receiver.receive(info["file"], bucket, partial(_load, self.parameters))

    def finish_weight_update(self, version: str) -> None:
        self.receiver.finish()


def _load(parameters: dict[str, torch.Tensor], pairs: Any) -> None:
    for name, tensor in pairs:
        parameters[name].copy_(tensor)


def _transport(
    tensors: dict[str, torch.Tensor], plan: tuple[Layout, ...], slots: list[Slot]
) -> Any:
    """All tensors into the slots, each bucket mapped again."""
    for index, layout in enumerate(plan):
        slot = slots[index % len(slots)]
        slot.begin(layout)
        for place in layout.places:
            slot.write(place, tensors[place.name])
        for _ in MappedBucket(slot.path).tensors():
            pass


def _apply(plan: tuple[Layout, ...], slot: Slot, parameters: dict[str, torch.Tensor]) -> None:
    """Every bucket's worth of tensors out of one mapped file; what they hold is of no matter."""
    for layout in plan:
        slot.begin(layout)
        _load(parameters, MappedBucket(slot.path).tensors())


def _measure(shape: Shape, dtype: torch.dtype, *, repetitions: int) -> tuple[dict[str, Any], float]:
    """Seconds of each part, and transport's share of the copy's bandwidth."""
    tensors = _tensors(shape, dtype)
    parameters = _scratch(tensors)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    source, control = _Source(tensors), _InProcess(parameters)
    sender = SharedMemorySender(source, control, bucket_bytes=BUCKET_BYTES)  # pyright: ignore[reportArgumentType]
    sender.connect()
    plan, size = plan_buckets(((m.name, m.dtype, m.shape) for m in source.metadata()), BUCKET_BYTES)
    assert sender.root is not None
    slots = [Slot(sender.root / f"measured_{i}", size) for i in range(2)]
    version = iter(range(1_000))
    try:
        moved = {
            "copy": lambda: _load(parameters, tensors.items()),
            "transport": lambda: _transport(tensors, plan, slots),
        }
        others = {  # apart: they warm the memory that the copy goes to
            "digest": lambda: [tensor_digest(tensor) for tensor in tensors.values()],
            "apply": lambda: _apply(plan, slots[0], parameters),
            "pause": lambda: _send(sender, next(version)),
        }
        seconds = interleaved_seconds(moved, repetitions=repetitions)
        seconds |= interleaved_seconds(others, repetitions=repetitions)
    finally:
        for slot in slots:
            slot.close()
        sender.close()
    results: dict[str, Any] = {f"{part}_s": median(times) for part, times in seconds.items()}
    results |= {f"{p}_gb_per_s": num_bytes / 1e9 / results[f"{p}_s"] for p in ("copy", "transport")}
    results["gigabytes"] = num_bytes / 1e9
    return results, results["copy_s"] / results["transport_s"]


def _send(sender: SharedMemorySender, version: int) -> str:
    sender.begin()
    return sender.send(version, may_equal=False)


@contextmanager
def _server(shape: Shape) -> Iterator[Endpoint]:
    """A rollout server as a run starts it, with random weights."""
    hidden, ffn, layers, heads, groups, vocab = shape
    settings = StartServer(kind="start", model="policy", max_model_len=256, num_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32",
            "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocab,
            "max_position_embeddings": 256, "tie_word_embeddings": True,
        }  # fmt: skip
        (Path(folder) / "config.json").write_text(json.dumps(config))
        fleet = Fleet(
            {"policy": settings},
            model_dirs={"policy": Path(folder)},
            log_dir=Path(folder),
            platform_kind="cpu",
            policy=("policy",),
            weight_transfer="shared_memory",
        )
        with fleet:
            fleet.wait()
            yield fleet.endpoints["policy"]


def _real_server(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Medians of the parts of whole exchanges with vLLM, pause to resume."""
    found: dict[str, list[float]] = {}
    with _server(shape) as endpoint:
        control = ControlClient([endpoint], timeout_s=120.0)
        source = _Source(_tensors(shape, dtype))
        sender = SharedMemorySender(source, control, bucket_bytes=BUCKET_BYTES)  # pyright: ignore[reportArgumentType]
        try:
            sender.connect()
            for version in range(EXCHANGES + 1):
                control.pause()
                started = time.perf_counter()
                _send(sender, version)
                control.resume()
                if version:  # the first one warms up
                    parts = {"pause": time.perf_counter() - started, **sender.seconds}
                    for part, value in parts.items():
                        found.setdefault(f"{part}_s", []).append(value)
        finally:
            sender.close()
    return {part: median(values) for part, values in found.items()}
