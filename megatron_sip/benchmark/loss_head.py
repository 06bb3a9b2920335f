"""Our loss head against the one of Megatron-Core: memory and time, forward and backward.

The plain head is what Megatron-Core does by itself on one rank: its ColumnParallelLinear makes
[tokens, vocabulary] logits, its vocab_parallel_cross_entropy turns them into the softmax in place
and keeps it. Both heads get the same hidden states, weight, labels and gradients, in fp32.

Memory is the peak of tensor bytes (`measure.peak_bytes`): of the forward pass, or of both passes
less the gradient of the weight, which either head must make, whichever is more; hidden states and
weight exist before. The ratio is that of the worst hidden size, with entropy, which ours alone
computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_sip.benchmark.measure import (
    interleaved_seconds,
    median_ratio,
    one_rank,
    peak_bytes,
)
from megatron_sip.loss_head import label_logprobs, label_logprobs_and_entropy

VOCABULARY = 128_256  # Llama 3's
TOKENS = 2_048
HIDDEN_SIZES = (256, 2_048)
REPETITIONS = 5


def run() -> dict[str, Any]:
    """The benchmark; about 4 GiB of memory, and several minutes on two cores.

    Returns: ratios `memory`, and `time_h256` and `time_h2048` by hidden size, ours / plain.
    """
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with one_rank():
        for hidden_size in HIDDEN_SIZES:
            found, ratio = _measure(hidden_size)
            results |= {f"h{hidden_size}_{name}": value for name, value in found.items()}
            ratios[f"time_h{hidden_size}"] = ratio["time"]
            ratios["memory"] = max(ratios.get("memory", 0.0), ratio["memory"])
    settings = {
        "vocabulary": VOCABULARY,
        "tokens": TOKENS,
        "hidden_sizes": list(HIDDEN_SIZES),
        "dtype": "float32",
        "repetitions": REPETITIONS,
        "threads": torch.get_num_threads(),
        "plain": "Megatron-Core: ColumnParallelLinear, vocab_parallel_cross_entropy, one rank",
    }
    return {"name": "loss-head", "settings": settings, "results": results, "ratios": ratios}


class _Heads:
    """One set of inputs and the heads that work on it."""

    def __init__(self, hidden_size: int) -> None:
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear

        generator = torch.Generator().manual_seed(1)
        config = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)
        self.layer: Any = ColumnParallelLinear(
            hidden_size, VOCABULARY, config=config, init_method=torch.nn.init.normal_, bias=False
        )
        self.layer.weight.data.normal_(0.0, 0.02, generator=generator)
        self.hidden = torch.randn(TOKENS, 1, hidden_size, generator=generator).requires_grad_()
        self.labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        self.upstream = torch.randn(TOKENS, generator=generator)

    def plain(self) -> torch.Tensor:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        logits, _ = self.layer(self.hidden)
        return -vocab_parallel_cross_entropy(logits, self.labels[:, None])[:, 0]

    def ours(self) -> torch.Tensor:
        return label_logprobs(self.hidden[:, 0], self.layer.weight, self.labels, group=None)

    def entropy(self) -> torch.Tensor:
        """Log-probs; the entropy is thrown away."""
        weight = self.layer.weight
        return label_logprobs_and_entropy(self.hidden[:, 0], weight, self.labels, group=None)[0]

    def both_passes(self, head: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Log-probs; the gradients are new ones of `hidden` and the layer's weight."""
        self.hidden.grad = self.layer.weight.grad = None
        logprobs = head()
        logprobs.backward(self.upstream)
        return logprobs.detach()

    def digest(self) -> str:
        """Of our log-probs and gradients."""
        parts = (self.both_passes(self.ours), self.hidden.grad, self.layer.weight.grad)
        return hashlib.sha256(b"".join(_digest(p) for p in parts if p is not None)).hexdigest()

    def peak(self, head: Callable[[], torch.Tensor]) -> int:
        """Bytes, without those of the weight's gradient."""
        self.hidden.grad = self.layer.weight.grad = None
        forward = peak_bytes(head)
        return max(forward, peak_bytes(lambda: self.both_passes(head)) - self.layer.weight.nbytes)


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()


def _measure(hidden_size: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Results and ratios at one hidden size."""
    heads = _Heads(hidden_size)
    tasks = {"plain": heads.plain, "ours": heads.ours, "entropy": heads.entropy}
    peaks = {name: heads.peak(head) for name, head in tasks.items()}
    equal = heads.digest() == heads.digest()
    seconds = interleaved_seconds(
        {name: partial(heads.both_passes, head) for name, head in tasks.items()},
        repetitions=REPETITIONS,
    )
    results = {f"peak_{n}_mib": peak / 2**20 for n, peak in peaks.items()}
    results |= {f"{n}_s": times for n, times in seconds.items()}
    results["entropy_time"] = median_ratio(seconds, "entropy", "ours")
    results["bitwise_equal"] = equal
    ratios = {
        "time": median_ratio(seconds, "ours", "plain"),
        "memory": max(peaks["ours"], peaks["entropy"]) / peaks["plain"],
    }
    return results, ratios
