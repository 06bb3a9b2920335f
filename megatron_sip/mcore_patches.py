"""Every patch that lets Megatron-Core run on CPU over gloo, in one place.

Megatron-Core 0.16.1 asks for "cuda" devices, streams and generator states in places that have a
CPU meaning; upstream does not promise a CPU path (Megatron-LM #6270, Megatron-Bridge #3853,
#5317). `install()` gives those requests their CPU meaning. It must run before anything of
`megatron.core` is built, never on a machine that trains on GPUs, and never in a vLLM process.

Each patch stands below with its reason. `tests/unit/test_mcore_patches.py` shows, for each one,
that Megatron-Core still needs it; when that test fails, delete the patch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TESTED_VERSIONS = ("0.16.",)
CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    """True for what names a CUDA device: "cuda:0", torch.device("cuda"), or a bare index."""
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    return str(device).startswith("cuda") and isinstance(device, str | torch.device)


class CudaRequestsToCpu(TorchFunctionMode):
    """Factory calls and `.to()` that name CUDA make CPU tensors.

    Reason: DDP buffers, the schedules' token counters and the optimizer's found-inf flag are
    created with `device="cuda"` or `torch.cuda.current_device()`.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        name = getattr(func, "__name__", "")
        if name == "to" and len(args) > 1 and isinstance(args[1], str | torch.device):
            args = (args[0], CPU if _is_cuda(args[1]) else args[1], *args[2:])
        if name == "type" and len(args) == 1 and isinstance(args[0], torch.Tensor):
            # The distributed optimizer tells parameter kinds by "torch.cuda.FloatTensor".
            return func(*args, **kwargs).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """CUDA stream of a device without streams: all work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _Event:
    """CUDA event of a device without streams: always passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _patch_torch_cuda() -> None:
    """Reason: Megatron-Core calls these without asking whether CUDA is there."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *args: None
    cuda.synchronize = lambda *args: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args: 0
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


def _patch_random_states() -> None:
    """Reason: tensor-parallel dropout keeps one generator state a rank, read from CUDA."""
    import megatron.core.tensor_parallel.random as mcore_random

    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    patched: Any = mcore_random
    patched._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_optimizer_load() -> None:
    """Reason: Torch's Adam counts steps in each parameter's state, where the GPU's fused Adam does
    not. Loading a `fully_reshardable` checkpoint leaves that entry out and then asks for it; and it
    gives all parameters one tensor, which then counts every parameter's step.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer: Any = DistributedOptimizer
    set_states = optimizer._set_main_param_and_optimizer_states

    def set_all_but_step(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {"step": state["step"], **tensors})

    load = optimizer.load_state_dict

    def load_and_part_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    optimizer._set_main_param_and_optimizer_states = set_all_but_step
    optimizer.load_state_dict = load_and_part_steps


def _patch_experts() -> None:
    """Reason: the router of experts asks whether `te_general_gemm` is None, a name that exists only
    where Transformer Engine does; and the numbers of tokens that ranks exchange become plain ones
    on their way from the GPU alone, while the exchange takes no others.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    patched: Any = moe_utils
    patched.te_general_gemm = None
    patched = token_dispatcher
    patched.maybe_move_tensor_to_cpu = to_cpu


def guard_unpickling() -> None:
    """Have Megatron-Core load checkpoints with `checkpoint_reading`; on every platform.

    Reason: it unpickles `.metadata` by plain pickle and sharded objects by torch.load with
    weights_only=False, and its load strategy makes reader and planner itself.

    Raises: RuntimeError if Megatron-Core has no such names; ValueError if torch is unguarded.
    """
    import megatron.core.dist_checkpointing.strategies.torch as strategies

    from megatron_sip.checkpoint_reading import Planner, Reader
    from megatron_sip.unpickling import refuse_unguarded_torch

    refuse_unguarded_torch()
    patched: Any = strategies
    guards = {
        "_get_filesystem_reader": lambda path, cache_metadata=False: Reader(path),
        "MCoreLoadPlanner": Planner,
    }
    for name, guard in guards.items():
        if not hasattr(strategies, name):
            raise RuntimeError(f"this megatron-core has no {name}: its loads cannot be guarded")
        setattr(patched, name, guard)


_installed = False


def install() -> None:
    """Apply all patches once to this process.

    Raises: RuntimeError if Megatron-Core is of a version for which they were never tested.
    """
    global _installed
    if _installed:
        return
    version = importlib.metadata.version("megatron-core")
    if not version.startswith(TESTED_VERSIONS):
        raise RuntimeError(
            f"megatron-core {version} is installed, but the CPU patches were tested with "
            f"{TESTED_VERSIONS} only; install one of those, or run the patch tests and extend "
            "TESTED_VERSIONS"
        )
    _patch_torch_cuda()
    CudaRequestsToCpu().__enter__()
    _patch_random_states()
    _patch_optimizer_load()
    _patch_experts()
    _installed = True
