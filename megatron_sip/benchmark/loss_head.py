"""Benchmark `loss-head`: log-probs and gradients of our head against Megatron-Core's.

The baseline is what GPTModel does with labels: all logits in one product, fp32, then
`vocab_parallel_cross_entropy`. Time is forward and backward, both heads in turn. Memory is measured
in a fresh process each: the largest resident set above that before the pass, less the gradients
that both must make.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from megatron_sip.benchmark.single_rank import single_rank
from megatron_sip.loss_head import label_logprobs

VOCABULARY, TOKENS = 128_256, 2048
HIDDEN_SIZES = (256, 2048)
MEMORY_HIDDEN_SIZE = 256
REPETITIONS = 5
Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probs float32[T] of labels[T], from hidden[T, H] and weight[V, H]."""
    return label_logprobs(hidden, weight, labels, group=None)


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `ours`, through all logits and Megatron-Core's cross entropy (one rank)."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = (hidden @ weight.t()).float()[:, None]  # [s, b, v]
    return -vocab_parallel_cross_entropy(logits, labels[:, None])[:, 0]


HEADS: dict[str, Head] = {"naive": naive, "ours": ours}


def inputs(hidden_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, hidden_size, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, hidden_size, generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


def passes(head: Head, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Any:
    """Seconds of forward and backward, log-probs, and gradients of hidden and weight."""
    begun = time.perf_counter()
    found = head(hidden, weight, labels)
    gradients = torch.autograd.grad(found.sum(), (hidden, weight))
    return time.perf_counter() - begun, found.detach(), *gradients


def extra_bytes(name: str, answer: Any) -> None:
    """Memory of one pass in this process, put into the queue `answer`."""
    single_rank()
    given = inputs(MEMORY_HIDDEN_SIZE)
    passes(HEADS[name], given[0][:8], given[1][:64], given[2][:8] % 64)  # libraries are loaded
    before = resident_bytes()
    kept = passes(HEADS[name], *given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.put(peak - before - sum(gradient.nbytes for gradient in kept[2:]))


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def memory() -> dict[str, int]:
    """Extra bytes of each head."""
    context, found = multiprocessing.get_context("spawn"), {}
    for name in HEADS:
        answer: Any = context.Queue()
        process = context.Process(target=extra_bytes, args=(name, answer))
        process.start()
        found[name] = answer.get(timeout=600)
        process.join()
    return found


def compare(hidden_size: int) -> dict[str, Any]:
    """Both heads in turn, so that a change of the machine's speed meets both."""
    given = inputs(hidden_size)
    first = {name: passes(head, *given) for name, head in HEADS.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    equal = True
    for _ in range(REPETITIONS):
        for name, head in HEADS.items():
            took, *tensors = passes(head, *given)
            seconds[name].append(took)
            if name == "ours":
                equal &= all(map(torch.equal, tensors, first[name][1:]))
    pairs = zip(first["naive"][1:], first["ours"][1:], strict=True)
    return {
        **{f"{name}_s": median(taken) for name, taken in seconds.items()},
        "ratio": median(b / a for a, b in zip(*seconds.values(), strict=True)),
        "bitwise_equal": equal,
        "largest_difference": max(float((a - b).norm() / a.norm()) for a, b in pairs),
    }


def loss_head() -> dict[str, Any]:
    """Ratios ours / naive: memory, and time at each hidden size (median of the repetitions)."""
    extra = memory()
    single_rank()
    times = {f"time_h{size}": compare(size) for size in HIDDEN_SIZES}
    return {
        "name": "loss-head",
        "settings": {"vocabulary": VOCABULARY, "tokens": TOKENS, "dtype": "float32", "threads": 1,
                     "memory_hidden_size": MEMORY_HIDDEN_SIZE},
        "results": {"extra_bytes": extra, **times},
        "ratios": {"memory": extra["ours"] / extra["naive"],
                   **{name: found["ratio"] for name, found in times.items()}},
    }  # fmt: skip
