"""Whole weight exchanges over several ranks: all but vLLM's model is real."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
import torch.distributed as dist
from tasks import LENGTH, OPTIMIZER, build_learner, module_with_weights, shared_batches, source_of
from workers import Context

sys.path.append(str(Path(__file__).parents[1] / "unit"))  # servers that are no vLLM

from exchange_helpers import Server, act_of
from fake_rollout_servers import FakeServer, rollout_servers

from megatron_sip.exchange import WeightExchange
from megatron_sip.forward import token_logprobs
from megatron_sip.learner import Learner
from megatron_sip.metrics import PhaseTimer
from megatron_sip.model import wrap_data_parallel
from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, PREFIX
from megatron_sip.optimizer import build_optimizer, build_scheduler
from megatron_sip.parallel import broadcast_object, gather_objects
from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed
from megatron_sip.rollout.shared_memory import SharedMemorySender
from megatron_sip.rollout.vllm_engine import VllmEngine
from megatron_sip.rows import make_rows
from megatron_sip.types import CandidatePool, Pick

NAMES = ("a", "b")


class Rollout:
    """Two rollout servers of rank 0, replaced as a whole by `restart`."""

    def __init__(self, logprobs: np.ndarray) -> None:
        self.logprobs, self.stack = logprobs, None
        self.start()

    def start(self) -> None:
        self.inner = [Server(name) for name in NAMES]
        self.fakes = [FakeServer(s.name, act=self.answers(s)) for s in self.inner]
        self.stack = rollout_servers(*self.fakes)
        self.endpoints = self.stack.__enter__()

    def stop(self) -> None:
        assert self.stack is not None
        self.stack.__exit__(None, None, None)

    def answers(self, server: Server) -> Any:
        act = act_of(server)

        def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
            if path != "/inference/v1/generate":
                return act(path, body)
            pairs = zip(body["token_ids"][1:], self.logprobs, strict=True)
            entries = [None, *({str(t): {"logprob": float(p)}} for t, p in pairs)]
            span = {"version": server.version, "start": 0, "end": 1}
            return {"choices": [{"index": 0, "weight_versions": [span]}],
                    "prompt_logprobs": entries}  # fmt: skip

        return answer


def probe_of(ctx: Context) -> Any:
    pool = cases.pools_of(next(iter(cases.CASES.values())))[0][0]
    picks = (Pick(ORIGINAL_SUFFIX, "target", 0.0, 1.0), Pick(PREFIX, "prefix", 0.0, 1.0))
    return make_rows([CandidatePool(pool.sample, "", (), 0.0)], [picks], length=LENGTH, pad=0)


def attempt(act: Any) -> dict[str, Any]:
    """What a rank sees of an exchange."""
    try:
        means = act()
    except WeightExchangeFailed as error:
        return {"failed": (error.reason, error.server, error.phase, error.broken)}
    return {"means": sorted(means)}


def exchanges(ctx: Context) -> dict[str, Any]:
    """A good exchange; one that fails in its second bucket, then a restart; a wrong probe."""
    model = cases.tiny_model(tied=False)
    learner = build_learner(ctx, model)
    probe = probe_of(ctx)
    width = int((probe.segment_ids[0] >= 0).sum()) - 1
    reports = token_logprobs(learner.policy.ddp, [probe])
    mine = reports[0][0, :width].numpy() if ctx.ranks.reports_loss else None
    gathered = gather_objects(mine, ctx.ranks)
    rollout = control = None
    if ctx.ranks.is_main:
        rollout = Rollout(next(x for x in gathered if x is not None))
        control = ControlClient(rollout.endpoints, timeout_s=20.0)
    endpoints = broadcast_object(rollout.endpoints if rollout else None)
    engine = None
    if ctx.ranks.is_io:
        engine = VllmEngine(
            endpoints, None, temperature=1.0, top_p=1.0, max_tokens=4, concurrency=4, timeout_s=20.0
        )  # pyright: ignore[reportArgumentType]
    sender = SharedMemorySender(source_of(ctx, learner.policy, model), control, bucket_bytes=60_000)
    moves = iter(range(100))
    exchange = WeightExchange(
        sender, control, engine, learner.policy, ctx.ranks, probe, 1e-3, lambda: next(moves)
    )
    timer, seen = PhaseTimer(), {}
    exchange.connect()
    seen["good"] = attempt(lambda: exchange.sync(3, timer)) | {"served": served(engine)}
    sent = {n: t.clone() for n, t in source_of(ctx, learner.policy, model)}
    if rollout is not None:
        seen["same"] = [
            s.loaded.keys() == sent.keys()
            and all(torch.equal(s.loaded[n], t) for n, t in sent.items())
            for s in rollout.inner
        ]
        rollout.inner[1].load = lambda pairs: 1 / 0
    for parameter in learner.policy.module.parameters():
        parameter.data.mul_(1.0 + 1e-6)
    seen["broken"] = attempt(lambda: exchange.sync(4, timer)) | {"served": served(engine)}
    seen["not restarted"] = attempt(lambda: exchange.restore(endpoints, 4, timer))
    if rollout is not None:
        rollout.stop()
        rollout.start()
    endpoints = broadcast_object(rollout.endpoints if rollout else None)
    seen["restored"] = attempt(lambda: exchange.restore(endpoints, 4, timer))
    seen["restored"]["served"] = served(engine)
    if rollout is not None:
        rollout.logprobs = rollout.logprobs + 0.5
    exchange.verified = False
    for parameter in learner.policy.module.parameters():
        parameter.data.mul_(1.0 + 1e-6)
    seen["wrong probe"] = attempt(lambda: exchange.sync(5, timer)) | {"served": served(engine)}
    if rollout is not None:
        rollout.stop()
    exchange.close()
    return seen


def served(engine: VllmEngine | None) -> str:
    return engine.weight_version if engine is not None else "not asked"


def exported_after_a_step(ctx: Context, overlap: bool) -> dict[str, Any]:
    """Weights as exported right after an optimizer step, beside the optimizer's own."""
    from megatron.core import parallel_state

    case = cases.CASES["nll"] if "nll" in cases.CASES else next(iter(cases.CASES.values()))
    settings = OPTIMIZER.model_copy(
        update={"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    )
    config, module = module_with_weights(ctx, case.model, seed=1)
    policy = wrap_data_parallel(config, module, settings, ctx.platform)
    optimizer = build_optimizer(policy, settings, ctx.platform)
    scheduler = build_scheduler(optimizer, settings, steps=10)
    learner = Learner(policy, optimizer, scheduler, ctx.ranks, ctx.platform)
    learner.learn(
        shared_batches(ctx, case), case.objective, reference=None, version=0, fresh_reference=False
    )
    stale = [p.detach().clone() for p in module.parameters()]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    main = []  # each rank's shard is what its optimizer updated
    for buffer in policy.ddp.buffers:
        for bucket in buffer.buckets:
            shards = bucket.param_data.view(ctx.ranks.dp_size, -1)
            gathered = [torch.empty_like(shards[0]) for _ in shards]
            dist.all_gather(gathered, shards[ctx.ranks.dp_rank].clone(), group=group)
            main.append(torch.cat(gathered))
    exported = {n: t.clone() for n, t in source_of(ctx, policy, case.model)}
    after = [
        bucket.param_data.clone() for buffer in policy.ddp.buffers for bucket in buffer.buckets
    ]
    return {
        "stale": any(
            not torch.equal(a, b) for a, b in zip(stale, module.parameters(), strict=True)
        ),
        "main": all(torch.equal(a, b.view(-1)) for a, b in zip(main, after, strict=True)),
        "exported": {n: t.numpy() for n, t in exported.items()},
        "moved": learner.num_moves,
    }
