"""Puts a run together from its recipe: data, model, optimizer, servers, clients, exchange."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_sip import checkpoint, checkpoint_files, curriculum, parallel, services
from megatron_sip.config import Config
from megatron_sip.convert.load import load_folder
from megatron_sip.data.blended_corpus import BlendedCorpus, open_corpus
from megatron_sip.data.sample_reader import SampleReader
from megatron_sip.data.sampler import CUT, PrefixSuffixSampler
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import RunFailed
from megatron_sip.evaluation.evaluate import Evaluator
from megatron_sip.exchange import WeightExchange
from megatron_sip.experience import (
    LiveExperience,
    PlainExperience,
    RecordedExperience,
    ResumedExperience,
)
from megatron_sip.learner import Learner
from megatron_sip.metrics import PhaseTimer
from megatron_sip.mismatch import limits_of
from megatron_sip.model import (
    Policy,
    build_module,
    initialize_randomly,
    transformer_config,
    wrap_data_parallel,
)
from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, PREFIX
from megatron_sip.optimizer import build_optimizer, build_scheduler
from megatron_sip.parallel import Ranks
from megatron_sip.platform import Platform
from megatron_sip.recovery import publish
from megatron_sip.rollout.control import ControlClient
from megatron_sip.rollout.shared_memory import SharedMemorySender
from megatron_sip.rollout.weight_source import MegatronWeightSource
from megatron_sip.rollout.weight_transfer import NcclSender
from megatron_sip.rows import make_rows, row_length
from megatron_sip.serving.fleet import Fleet
from megatron_sip.serving.health import ServerFailed
from megatron_sip.serving.supervisor import Supervisor
from megatron_sip.step import Run
from megatron_sip.supervision.heartbeat import HEART
from megatron_sip.types import CandidatePool, Pick, TrainState

log = logging.getLogger(__name__)


def open_data(config: Config) -> tuple[Tokenizer, dict[str, BlendedCorpus]]:
    """Tokenizer and data, checked against each other.

    Raises: ValueError if one is missing or damaged, or was made with another tokenizer.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    datasets = {}
    for split in ("train", "validation", "test"):
        datasets[split] = open_corpus(
            getattr(config.data, split),
            min_tokens=config.data.min_prefix_tokens + config.data.suffix_tokens,
            cache_dir=config.data.cache_dir,
        )
        datasets[split].check_tokenizer(tokenizer.digest, path=config.data.tokenizer)
    return tokenizer, datasets


def sampler_of(config: Config, corpus: BlendedCorpus, tokenizer: Tokenizer, seed: int) -> Any:
    """Samples of one split as the recipe cuts them."""
    return PrefixSuffixSampler(
        corpus,
        prefix_tokens=config.data.prefix_tokens,
        min_prefix_tokens=config.data.min_prefix_tokens,
        suffix_tokens=config.data.suffix_tokens,
        seed=seed,
        word_starts=tokenizer.word_starts,
        eod=tokenizer.eod,
    )


def build_policy(
    config: Config,
    platform: Platform,
    ranks: Ranks,
    tokenizer: Tokenizer,
    identity: dict[str, Any],
    *,
    resume: bool,
) -> Policy:
    """Model with its first weights (to be loaded, in a resumed run), wrapped for data parallel."""
    model_config = transformer_config(config.model, config.parallel, platform)
    vocab_size = config.model.vocabulary(tokenizer.vocab_size)
    module = build_module(model_config, config.model, platform, vocab_size=vocab_size)
    init = config.model.init
    if init.kind == "random" or resume:
        initialize_randomly(module, config.model, seed=config.run.seed)
    elif init.kind == "huggingface":
        load_folder(init.path, module, config.model, vocab_size=vocab_size)
    else:
        checkpoint.load_weights(
            init.path, module=module, identity=identity, ranks=ranks, key="model.init.path"
        )
    return wrap_data_parallel(model_config, module, config.optimizer, platform)


def build_run(
    config: Config,
    platform: Platform,
    ranks: Ranks,
    tokenizer: Tokenizer,
    datasets: dict[str, BlendedCorpus],
    console: Any,
    stack: ExitStack,
    *,
    resume: bool,
) -> Run:
    """Everything of this rank but servers; `stack` closes it."""
    vocab_size = config.model.vocabulary(tokenizer.vocab_size)
    identity = checkpoint_files.model_identity(
        config.model, vocab_size=vocab_size, tokenizer_digest=tokenizer.digest
    )
    policy = build_policy(config, platform, ranks, tokenizer, identity, resume=resume)
    optimizer = build_optimizer(policy, config.optimizer, platform)
    scheduler = build_scheduler(optimizer, config.optimizer, steps=config.run.steps)
    multiple = platform.token_multiple(
        tensor_parallel=config.parallel.tensor_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    digests = {"tokenizer": tokenizer.digest, "cut of documents": CUT}
    for split, corpus in datasets.items():
        digests |= corpus.identity(split)
    stats = curriculum.initial_stats(config.curriculum) if config.curriculum else {}

    def on_phase(phase: str) -> None:
        console.phase(phase)
        HEART.beat(phase=phase)

    timer = PhaseTimer(on_phase=on_phase)
    reader = stack.enter_context(
        SampleReader(
            sampler_of(config, datasets["train"], tokenizer, config.run.seed),
            batch=config.data.global_batch_size,
            steps=config.data.prefetch_steps,
        )
    )
    return Run(
        config=config,
        platform=platform,
        ranks=ranks,
        learner=Learner(policy, optimizer, scheduler, ranks, platform, limits_of(config.rollout)),
        experience=PlainExperience(reader, timer) if ranks.is_io else None,
        exchange=None,
        timer=timer,
        console=console,
        row_length=row_length(config.data.prefix_tokens, config.data.suffix_tokens, multiple),
        row_multiple=multiple,
        pad=tokenizer.eod,
        vocab_size=vocab_size,
        state=TrainState(0, 0, 0, stats, digests),
        identity=identity,
        record_pools=config.run.task == "sip",
    )


def connect_servers(
    run: Run,
    tokenizer: Tokenizer,
    datasets: dict[str, BlendedCorpus],
    pools_dir: Path | None,
    stack: ExitStack,
) -> dict[str, Evaluator]:
    """Give the run its source of experience, and make its evaluators (none for a replay).

    Returns: by split: "test", and "validation" if the run is to be evaluated while it goes on.
    """
    config, ranks = run.config, run.ranks
    if pools_dir is not None:
        if ranks.is_io:
            run.experience = RecordedExperience(pools_dir, ranks.dp_rank, ranks.dp_size)
        run.record_pools = False
        return {}
    evaluators = build_evaluators(run, tokenizer, datasets)
    if config.run.task == "ntp":
        return evaluators
    assert config.rollout is not None and config.judge is not None
    trust = config.judge.trust
    fleet, endpoints = start_servers(run, tokenizer, stack)
    if ranks.is_io:
        found = services.connect(
            config,
            endpoints,
            tokenizer=tokenizer,
            train=datasets["train"],
            canaries=sampler_of(config, datasets["validation"], tokenizer, config.run.seed),
            share=parallel.shard(trust.num_canaries, ranks).tolist() if trust else (),
            stack=stack,
        )
        for evaluator in evaluators.values():
            evaluator.engine, evaluator.judge = found.engine, found.evaluation_judge
        assert isinstance(run.experience, PlainExperience)
        run.experience = LiveExperience(
            reader=run.experience.reader,
            tokenizer=tokenizer,
            engine=found.engine,
            judge=found.judge,
            rewriter=found.rewriter,
            timer=run.timer,
            seed=config.run.seed,
            min_candidate_tokens=max(1, config.data.suffix_tokens // 8),
            guards=config.judge.guards,
            dp_size=ranks.dp_size,
            watch=found.watch,
        )
        if run.replay_until > run.state.step:
            recorded = RecordedExperience(
                Path(config.run.dir) / "pools", ranks.dp_rank, ranks.dp_size
            )
            run.experience = ResumedExperience(recorded, run.experience, run.replay_until)
    run.exchange = build_exchange(run, tokenizer, evaluators["test"], endpoints, stack, fleet)
    publish(run, first=True)
    return evaluators


def build_evaluators(
    run: Run, tokenizer: Tokenizer, datasets: dict[str, BlendedCorpus]
) -> dict[str, Evaluator]:
    """One for each split that is evaluated, without servers yet."""
    settings = run.config.evaluation
    sizes = {"test": settings.num_prefixes}
    if settings.interval is not None:
        sizes["validation"] = settings.interval_prefixes
    evaluators = {}
    for split, size in sizes.items():
        sampler = sampler_of(run.config, datasets[split], tokenizer, settings.seed)
        samples = [sampler[i] for i in range(size)]
        if run.config.run.task == "sip" and len({s.document_id for s in samples}) < 2:
            raise ValueError(
                f"evaluation on data.{split}: its {size} prefixes are of one document, and an "
                "interval needs two or more; give more documents or more prefixes"
            )
        evaluators[split] = Evaluator(
            settings=settings,
            samples=samples,
            tokenizer=tokenizer,
            ranks=run.ranks,
            row_length=run.row_length,
            device=run.platform.device,
        )
    return evaluators


def start_servers(
    run: Run, tokenizer: Tokenizer, stack: ExitStack
) -> tuple[Fleet | None, dict[str, Any]]:
    """Rank 0 starts and supervises; every rank learns the addresses.

    Raises: RunFailed on every rank if a server does not come up.
    """
    fleet = failure = None
    found: Any = (None, {}, "")
    if run.ranks.is_main:
        try:
            fleet = services.start_fleet(run.config, run.platform, tokenizer=tokenizer, stack=stack)
            run.servers = supervised(run, fleet, stack)
            found = (fleet.endpoints, run.servers.gone(), "")
        except ServerFailed as error:
            failure, found = error, (None, {}, str(error).splitlines()[0])
    endpoints, gone, reason = parallel.broadcast_object(found)
    if reason:
        raise failure or RunFailed(reason)
    HEART.accept(gone)
    return fleet, endpoints


def supervised(run: Run, fleet: Fleet, stack: ExitStack) -> Supervisor:
    """A supervisor of a fleet that was just started; all servers are up when it returns.

    Raises: ServerFailed.
    """
    assert run.config.rollout is not None

    def on_wait(name: str, seconds: float) -> None:
        run.console.note(f"waiting for server {name}: {seconds:.0f} s")
        HEART.beat(phase=f"wait for server {name}")

    policy = run.config.rollout.servers
    supervisor = stack.enter_context(
        Supervisor(fleet, policy=policy, heart=HEART, say=run.console.note)
    )
    fleet.wait(on_wait, names=run.config.servers.keys() - fleet.local.keys())
    supervisor.settle()
    return supervisor


def build_exchange(
    run: Run, tokenizer: Tokenizer, evaluator: Evaluator, endpoints: dict[str, Any],
    stack: ExitStack, fleet: Fleet | None,
) -> WeightExchange:  # fmt: skip
    """The weight exchange with its backend, not yet connected."""
    config, ranks, rollout = run.config, run.ranks, run.config.rollout
    assert rollout is not None
    source = MegatronWeightSource(
        run.learner.policy, config.model, ranks, run.platform, vocab_size=run.vocab_size
    )
    control = None
    if ranks.is_main:
        servers = [endpoints[name] for name in rollout.servers]
        control = ControlClient(servers, timeout_s=rollout.sync_timeout_s)
    if rollout.weight_transfer == "shared_memory":
        bucket_bytes = rollout.bucket_mib * 2**20
        sender: Any = SharedMemorySender(source, control, bucket_bytes=bucket_bytes)
        if fleet is not None and sender.root is not None:
            fleet.delete_at_end(sender.root)
    else:
        from megatron_sip.serving.processes import free_port

        sender = NcclSender(
            source,
            control,
            bucket_mib=rollout.bucket_mib,
            rank=ranks.rank,
            master_address=services.local_address(),
            next_port=free_port,
        )
    sample = evaluator.samples[0]
    picks = (Pick(ORIGINAL_SUFFIX, "target", 0.0, 1.0), Pick(PREFIX, "prefix", 0.0, 1.0))
    probe = make_rows(
        [CandidatePool(sample, "", (), 0.0)], [picks], length=run.row_length, pad=run.pad
    )
    engine = evaluator.engine
    exchange = WeightExchange(
        sender, control, engine, run.learner.policy, ranks,
        type(probe)(**{k: v.to(run.platform.device) for k, v in vars(probe).items()}),
        rollout.max_logprob_mismatch,
        lambda: run.learner.num_moves,
    )  # fmt: skip
    stack.callback(exchange.close)
    return exchange
