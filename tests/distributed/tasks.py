"""What the processes of `workers.py` do with the package: build, step, export, save, load."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np
import torch
import torch.distributed as dist
from workers import Context

from megatron_sip import checkpoint, checkpoint_files
from megatron_sip.config import Model, Optimizer
from megatron_sip.forward import token_logprobs
from megatron_sip.learner import ENGINE, Learner, StepStopped, needs_reference
from megatron_sip.metrics import reduce_means
from megatron_sip.mismatch import MismatchLimits
from megatron_sip.model import (
    Policy,
    build_module,
    frozen_copy,
    global_name,
    initialize_randomly,
    is_sliced,
    transformer_config,
    wrap_data_parallel,
)
from megatron_sip.objectives import picks_of
from megatron_sip.optimizer import build_optimizer, build_scheduler
from megatron_sip.parallel import broadcast_rows, gather_objects, shard
from megatron_sip.rollout.weight_source import MegatronWeightSource
from megatron_sip.rows import make_micro_batches, row_length
from megatron_sip.types import TrainRows, TrainState

LENGTH = row_length(cases.LONGEST_PREFIX, cases.SUFFIX, 1)
OPTIMIZER = Optimizer(lr=1e-2, clip_grad=1.0)
IDENTITY_TOKENIZER = "tokenizer-digest"
LIMITS = {
    "mismatch": MismatchLimits(mean=0.5),
    "mismatch of the 99th percentile": MismatchLimits(p99=1.0),
    "largest mismatch": MismatchLimits(maximum=30.0),
    "KL": MismatchLimits(kl=0.5),
}
Tensors = dict[str, np.ndarray]


def module_with_weights(ctx: Context, model: Model, *, seed: int) -> tuple[Any, Any]:
    """A module whose norms are not all ones, the same for every layout."""
    config = transformer_config(model, ctx.parallel, ctx.platform)
    module = build_module(config, model, ctx.platform, vocab_size=cases.VOCAB)
    initialize_randomly(module, model, seed=seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and not is_sliced(name):
            wave = torch.arange(parameter.numel(), device=parameter.device)
            wave = wave + len(global_name(name, module)) + seed
            layer = sum(map(ord, global_name(name, module)))
            parameter.data.add_(0.3 * torch.sin(wave * (1.0 + layer % 7)))
    return config, module


def build_learner(ctx: Context, model: Model, *, seed: int = 1, lr: float = 1e-2) -> Learner:
    settings = OPTIMIZER.model_copy(update={"lr": lr})
    config, module = module_with_weights(ctx, model, seed=seed)
    policy = wrap_data_parallel(config, module, settings, ctx.platform)
    optimizer = build_optimizer(policy, settings, ctx.platform)
    scheduler = build_scheduler(optimizer, settings, steps=10)
    return Learner(policy, optimizer, scheduler, ctx.ranks, ctx.platform)


def source_of(ctx: Context, policy: Any, model: Model) -> MegatronWeightSource:
    return MegatronWeightSource(policy, model, ctx.ranks, ctx.platform, vocab_size=cases.VOCAB)


def export(ctx: Context, policy: Any, model: Model) -> Tensors:
    return {n: t.detach().float().cpu().numpy().copy() for n, t in source_of(ctx, policy, model)}


def bare(module: Any) -> Any:
    """A module without data-parallel wrapper, as the weight source wants it."""
    return SimpleNamespace(
        module=module, ddp=SimpleNamespace(start_param_sync=lambda force_sync: None)
    )


def full_gradients(ctx: Context, policy: Policy, model: Model) -> Tensors:
    """Gradients after the reduce-scatter, by Hugging Face name, on rank 0."""
    from megatron.core import parallel_state

    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    of_experts = parallel_state.get_expert_data_parallel_group()
    buffers = [(buffer, dense) for buffer in policy.ddp.buffers]
    buffers += [(buffer, of_experts) for buffer in policy.ddp.expert_parallel_buffers]
    for buffer, group in buffers:
        for bucket in buffer.buckets:
            shards = bucket.grad_data.view(group.size(), -1)
            gathered = [torch.empty_like(shards[0]) for _ in shards]
            dist.all_gather(gathered, shards[group.rank()].clone(), group=group)
            shards.copy_(torch.stack(gathered))
    grads = [(n, p.main_grad) for n, p in policy.module.named_parameters()]
    view = SimpleNamespace(named_parameters=lambda: grads, decoder=policy.module.decoder)
    return export(ctx, bare(view), model)


class Spy:
    """An optimizer that looks at the gradients before it steps."""

    def __init__(self, optimizer: Any, look: Any) -> None:
        self._optimizer, self._look = optimizer, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> Any:
        self._look()
        return self._optimizer.step()


def micro_batches(case: cases.Case, positions: np.ndarray) -> list[TrainRows]:
    pools, rewards = cases.pools_of(case)
    pools, rewards = [pools[i] for i in positions], [rewards[i] for i in positions]
    picks = picks_of(pools, rewards, case.objective, seed=1)
    return make_micro_batches(
        pools,
        picks,
        micro_batch_size=case.micro_batch_size,
        length=LENGTH,
        multiple=1,
        pad=0,
        layout=case.objective.row_layout,
    )


def shared_batches(ctx: Context, case: cases.Case) -> list[TrainRows]:
    """This replica's micro-batches, made by its I/O rank alone."""
    mine = micro_batches(case, shard(cases.NUM_POOLS, ctx.ranks)) if ctx.ranks.is_io else None
    return broadcast_rows(mine, ctx.ranks, ctx.platform)


def tied_copies_agree(policy: Policy) -> bool:
    """Do the first and the last stage hold the same embedding matrix?"""
    from megatron.core import parallel_state

    if not parallel_state.is_rank_in_embedding_group():
        return True
    mine = policy.module.shared_embedding_or_output_weight().data
    parts = [torch.empty_like(mine) for _ in range(parallel_state.get_embedding_group().size())]
    dist.all_gather(parts, mine, group=parallel_state.get_embedding_group())
    return all(torch.equal(part, mine) for part in parts)


def step_once(ctx: Context, case: cases.Case) -> dict[str, Any]:
    """One optimizer step of a case: weights, gradients, loss, gradient norm."""
    model = case.model
    learner = build_learner(ctx, model)
    reference = None
    result: dict[str, Any] = {"reference": {}}
    result["policy"] = export(ctx, learner.policy, model)
    if case.engine_reference:
        reference = ENGINE
    elif needs_reference(case.objective):
        _, reference = module_with_weights(ctx, model, seed=2)
        reference.requires_grad_(False)
        result["reference"] = export(ctx, bare(reference), model)

    def look() -> None:
        result["gradients"] = full_gradients(ctx, learner.policy, model)

    learner.optimizer = Spy(learner.optimizer, look)
    means, _ = learner.learn(
        shared_batches(ctx, case), case.objective, reference=reference, version=0,
        fresh_reference=False,
    )  # fmt: skip
    parts = gather_objects(means, ctx.ranks)
    result["metrics"] = reduce_means(parts) if parts else {}
    result["after"] = export(ctx, learner.policy, model)
    result["tied_agree"] = not case.tied or tied_copies_agree(learner.policy)
    return result


def step_all(ctx: Context, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: step_once(ctx, (cases.CASES | cases.FAMILIES)[name]) for name in names}


def first_weights(ctx: Context, tied: bool, seed: int) -> dict[str, Any]:
    """Export of untouched first weights, with the metadata that announces it."""
    model = cases.tiny_model(tied=tied)
    config = transformer_config(model, ctx.parallel, ctx.platform)
    module = build_module(config, model, ctx.platform, vocab_size=cases.VOCAB)
    initialize_randomly(module, model, seed=seed)
    policy = wrap_data_parallel(config, module, OPTIMIZER, ctx.platform)
    source = source_of(ctx, policy, model)
    twice = [{n: t.detach().numpy().copy() for n, t in source} for _ in range(2)]
    metadata = [(i.name, str(i.dtype), i.shape) for i in source.metadata()]
    return {"first": twice[0], "second": twice[1], "metadata": metadata}


def score(ctx: Context, tied: bool, tokens: np.ndarray) -> dict[str, Any]:
    """Exported weights, and log-probs of tokens[:, 1:] from the policy and from a frozen copy."""
    model = cases.tiny_model(tied=tied)
    learner = build_learner(ctx, model)
    ids = torch.from_numpy(tokens)
    rows = replace(
        micro_batches(cases.CASES["nll"], np.arange(2))[0],
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=torch.arange(ids.shape[1] - 1).expand(len(ids), -1).contiguous(),
    )
    copied = frozen_copy(
        learner.policy, SimpleNamespace(model=model), ctx.platform, vocab_size=cases.VOCAB
    )
    found = token_logprobs(learner.policy.ddp, [rows])
    again = token_logprobs(copied, [rows])
    return {
        "weights": export(ctx, learner.policy, model),
        "logprobs": found[0].numpy() if ctx.ranks.reports_loss else None,
        "copy": again[0].numpy() if ctx.ranks.reports_loss else None,
    }


def received_rows(ctx: Context, case_name: str) -> dict[str, Any]:
    """Every micro-batch of this rank as bytes, and the replica it belongs to."""
    batches = shared_batches(ctx, cases.CASES[case_name])
    names = [f.name for f in fields(TrainRows)]
    content = [
        {n: (str(getattr(b, n).dtype), getattr(b, n).numpy().tobytes()) for n in names}
        for b in batches
    ]
    return {"replica": ctx.ranks.dp_rank, "rows": content}


def identity_of(model: Model) -> dict[str, Any]:
    return checkpoint_files.model_identity(
        model, vocab_size=cases.VOCAB, tokenizer_digest=IDENTITY_TOKENIZER
    )


def train_and_save(ctx: Context, run_dir: Path, tied: bool) -> dict[str, Any]:
    """One real step, then a checkpoint; what was exported at that moment."""
    case = cases.CASES["nll_tied" if tied else "nll"]
    learner = build_learner(ctx, case.model)
    learner.learn(
        shared_batches(ctx, case), case.objective, reference=None, version=0, fresh_reference=False
    )
    pending = checkpoint.save(
        run_dir,
        policy=learner.policy,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
        state=TrainState(7, 56, 7, {"stage": 1.0}, {"tokenizer": IDENTITY_TOKENIZER}),
        identity=identity_of(case.model),
    )
    pending.finish()
    return {"folder": pending.folder, "weights": export(ctx, learner.policy, case.model)}


def load(ctx: Context, path: Path, tied: bool, changed: dict[str, Any]) -> dict[str, Any]:
    """Load weights, or say why not and whether Megatron-Core was asked to load anything."""
    from megatron.core import dist_checkpointing

    model = cases.tiny_model(tied=tied)
    config, module = module_with_weights(ctx, model, seed=9)
    original, asked = dist_checkpointing.load, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(True)
        return original(*args, **kwargs)

    dist_checkpointing.load = watched
    try:
        checkpoint.load_weights(
            path, module=module, identity=identity_of(model) | changed, ranks=ctx.ranks
        )
    except ValueError as error:
        return {"error": str(error), "asked": bool(asked)}
    finally:
        dist_checkpointing.load = original
    policy = wrap_data_parallel(config, module, OPTIMIZER, ctx.platform)
    return {"weights": export(ctx, policy, model), "agree": not tied or tied_copies_agree(policy)}


def stopped_step(ctx: Context, harm: str) -> dict[str, Any]:
    """A step that must stop: the harm is done to the last data-parallel replica alone."""
    case = replace(cases.CASES["dpo"], none_live=harm == "nothing to learn")
    if harm == "nothing to learn":
        objective = case.objective.model_copy(update={"suffix_weight": 0.0, "prefix_weight": 0.0})
        case = replace(case, objective=objective)
    learner = build_learner(ctx, case.model)
    learner.limits = LIMITS.get(harm, learner.limits)
    _, reference = module_with_weights(ctx, case.model, seed=2)
    batches = shared_batches(ctx, case)
    if ctx.ranks.dp_rank == ctx.ranks.dp_size - 1:
        if harm in LIMITS:
            batches[-1] = replace(
                batches[-1], policy_versions=torch.zeros_like(batches[-1].policy_versions),
                rollout_logprobs=batches[-1].rollout_logprobs - 50.0,
            )  # fmt: skip
        elif harm in ("nan", "inf"):
            last = batches[-1].weights.clone()
            last[:] = math.nan if harm == "nan" else math.inf
            batches[-1] = replace(batches[-1], weights=last)
        elif harm == "nan weights":
            next(iter(learner.policy.module.parameters())).data[..., 0] = math.nan
        elif harm == "nan gradient":  # the loss stays finite
            parameter = next(iter(learner.policy.module.parameters()))
            parameter.register_hook(lambda gradient: gradient * math.nan)
    parameters = list(learner.policy.module.parameters())
    before = [p.detach().numpy().tobytes() for p in parameters]
    rate = learner.scheduler.num_steps
    started, stopped = time.monotonic(), None
    try:
        learner.learn(
            batches, case.objective, reference=reference, version=0,
            fresh_reference=harm == "stale reference",
        )  # fmt: skip
    except StepStopped as error:
        stopped = str(error)
    after = [p.detach().numpy().tobytes() for p in parameters]
    return {
        "stopped": stopped,
        "unchanged": before == after,
        "schedule": learner.scheduler.num_steps - rate,
        "seconds": time.monotonic() - started,
    }


class NoOptimizer:
    """In place of Megatron-Core's, which keeps fp32 copies of bf16 weights on CUDA only."""

    param_groups = ({"lr": 0.0},)

    def zero_grad(self) -> None: ...

    def step(self) -> tuple[bool, float, None]:
        return True, 1.0, None


def build_half_learner(ctx: Context, model: Model) -> Learner:
    """A learner in bf16 as on CUDA: Megatron-Core's Float16Module, gradients in fp32."""
    config, module = module_with_weights(ctx, model, seed=1)
    config.bf16 = True
    policy = wrap_data_parallel(config, module, OPTIMIZER, ctx.platform)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    scheduler = SimpleNamespace(optimizer=NoOptimizer(), step=lambda increment: None)
    return Learner(policy, NoOptimizer(), scheduler, ctx.ranks, ctx.platform)


def fresh_reference_step(ctx: Context, case_name: str, dtype: torch.dtype) -> dict[str, float]:
    """Metrics of a step whose reference is a copy of the policy of that moment."""
    case = cases.CASES[case_name]
    ctx = replace(ctx, platform=replace(ctx.platform, params_dtype=dtype))
    build = build_learner if dtype == torch.float32 else build_half_learner
    learner = build(ctx, case.model)
    reference = frozen_copy(
        learner.policy, SimpleNamespace(model=case.model), ctx.platform, vocab_size=cases.VOCAB
    )
    means, _ = learner.learn(
        shared_batches(ctx, case), case.objective, reference=reference, version=0,
        fresh_reference=True,
    )  # fmt: skip
    parts = gather_objects(means, ctx.ranks)
    return reduce_means(parts) if parts else {}


def losses_of_steps(ctx: Context, case_name: str, steps: int) -> list[float]:
    """Loss of each of several steps on the same rows, in deterministic mode."""
    case = cases.CASES[case_name]
    ctx = replace(ctx, platform=replace(ctx.platform, deterministic=True))
    learner = build_learner(ctx, case.model, lr=1e-3)
    _, reference = module_with_weights(ctx, case.model, seed=2)
    batches = shared_batches(ctx, case)
    losses = []
    for _ in range(steps):
        means, _ = learner.learn(
            batches, case.objective, reference=reference, version=0, fresh_reference=False
        )
        losses.append(reduce_means([means])["loss"])
    return losses
