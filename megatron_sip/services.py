"""Servers of a run and the clients that speak to them, built from the recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.config import (
    Config,
    ConnectServer,
    StartServer,
)
from megatron_sip.config_judge import Criterion, LikelihoodCriterion, NoveltyCriterion
from megatron_sip.convert.families import SpecialIds, describe
from megatron_sip.data.blended_corpus import BlendedCorpus
from megatron_sip.data.frequencies import pair_frequencies
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.novelty import Novelty
from megatron_sip.judge.served_model import ServedModel, folder_digest
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.platform import Platform
from megatron_sip.rewriting.rewriter import Rewriter
from megatron_sip.rollout.vllm_engine import VllmEngine
from megatron_sip.serving.adoption import Handover
from megatron_sip.serving.client import Endpoint
from megatron_sip.serving.fleet import Fleet
from megatron_sip.supervision.restarts import launch_of
from megatron_sip.trust.look import Watch
from megatron_sip.types import SipSample


@dataclass(frozen=True)
class Services:
    """Clients of one I/O rank."""

    engine: VllmEngine
    judge: Judge
    evaluation_judge: Judge
    rewriter: Rewriter | None
    watch: Watch | None


def start_fleet(
    config: Config, platform: Platform, *, tokenizer: Tokenizer, stack: ExitStack
) -> Fleet:
    """Start all local servers on rank 0; the policy's folder holds a config and no weights."""
    assert config.rollout is not None
    run_dir = config.run.dir
    dirs = {}
    for name, server in config.servers.items():
        if not isinstance(server, StartServer):
            continue
        if server.model == "policy":
            folder = run_dir / "servers" / name
            folder.mkdir(parents=True, exist_ok=True)
            description = describe(
                config.model,
                vocab_size=config.model.vocabulary(tokenizer.vocab_size),
                special=SpecialIds(eos=tokenizer.eod),
                dtype=str(platform.params_dtype).removeprefix("torch."),
            )
            (folder / "config.json").write_text(json.dumps(description, indent=1))
            dirs[name] = folder
        else:
            dirs[name] = Path(server.model)
    fleet = Fleet(
        config.servers,
        model_dirs=dirs,
        log_dir=run_dir / "logs",
        platform_kind=config.platform.kind,
        policy=config.rollout.servers,
        weight_transfer=config.rollout.weight_transfer,
        handover=Handover(run_dir / "servers" / "live.json", launch_of().heir),
    )
    return stack.enter_context(fleet)


def connect(
    config: Config,
    endpoints: dict[str, Endpoint],
    *,
    tokenizer: Tokenizer,
    train: BlendedCorpus,
    canaries: Any,
    share: Sequence[int],
    stack: ExitStack,
) -> Services:
    """Clients of all servers for one I/O rank.

    Args: canaries: sampler of what judges are looked at with. share: this rank's part of a look.
    """
    assert config.rollout is not None and config.judge is not None
    rollout = config.rollout
    engine = VllmEngine(
        [endpoints[name] for name in rollout.servers],
        tokenizer,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_tokens=config.data.suffix_tokens,
        concurrency=rollout.concurrency,
        timeout_s=rollout.timeout_s,
        vocab_size=config.model.vocabulary(tokenizer.vocab_size),
    )
    cache = Cache(config.judge.cache_dir)
    stack.callback(cache.close)
    evaluation = LikelihoodCriterion(
        form="likelihood",
        name="evaluation",
        server=config.evaluation.server,
        prefix_tokens=config.evaluation.prefix_tokens,
    )
    criteria = config.judge.criteria
    asked = [c for c in criteria if not isinstance(c, NoveltyCriterion)]
    has_novelty = len(asked) < len(criteria)
    if config.judge.trust and config.judge.trust.second:
        asked.append(config.judge.trust.second)
    used = {name for c in asked for name in c.servers} | {config.evaluation.server}
    novelty = None
    if has_novelty:
        novelty = Novelty(pair_frequencies(train), tokenizer.eod)
    if config.rewriter:
        used.add(config.rewriter.server)
    models = {name: served_model(config, name, endpoints[name]) for name in used}

    def prefix_text(sample: SipSample, num_tokens: int) -> str:
        return tokenizer.decode(sample.prefix_ids[-num_tokens:])

    def suffix_text(sample: SipSample) -> str:
        return tokenizer.continuation_text(sample.prefix_ids, sample.suffix_ids)[1]

    def make_judge(criteria: Sequence[Criterion]) -> Judge:
        assert config.judge is not None
        return Judge(
            criteria,
            servers=models,
            cache=cache,
            settings=config.judge,
            prefix_text=prefix_text,
            suffix_text=suffix_text,
            novelty=novelty,
            run=str(config.run.dir),
        )

    rewriter = None
    if config.rewriter:
        rewriter = Rewriter(
            config.rewriter,
            server=models[config.rewriter.server],
            cache=cache,
            tokenizer=tokenizer,
            suffix_tokens=config.data.suffix_tokens,
        )
    watch = None
    if config.judge.trust is not None:
        watch = Watch(
            config.judge.trust,
            config.judge,
            models,
            canaries,
            lambda sample: tokenizer.continuation_text(sample.prefix_ids, sample.suffix_ids),
            prefix_text,
            share,
            config.run.seed,
        )
    return Services(engine, make_judge(criteria), make_judge([evaluation]), rewriter, watch)


def served_model(config: Config, name: str, endpoint: Endpoint) -> ServedModel:
    """A text server of the recipe with its tokenizer and what names its weights."""
    server = config.servers[name]
    if isinstance(server, ConnectServer):
        tokenizer = JudgeTokenizer(server.tokenizer) if server.tokenizer else None
        prices = server.prompt_price, server.completion_price
        return ServedModel(endpoint, tokenizer, server.model, *prices)
    folder = Path(server.model)
    return ServedModel(endpoint, JudgeTokenizer(folder), folder_digest(folder))


def local_address() -> str:
    """Address of rank 0's host, as torchrun knows it (the NCCL exchange listens there)."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
