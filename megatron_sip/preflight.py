"""What would stop a run, found from recipe, files and environment in about a second.

Imports no torch, starts nothing and writes nothing. Each check yields messages that name the key,
the value, the rule and the remedy; all of them run, so that one start shows all that is wrong.
What needs a model's sizes (memory, disk, prompt lengths) is in `explain`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sip import checkpoint_files
from megatron_sip.config import (
    Config,
    ConnectServer,
    StartServer,
    api_key,
)
from megatron_sip.config_judge import PromptedCriterion
from megatron_sip.convert.hf_folder import agreement_problems
from megatron_sip.data.blended_corpus import open_corpus
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import refuse
from megatron_sip.judge.calibration import check_suffixes, read_pairs
from megatron_sip.judge.prompts import check_form, load_prompt
from megatron_sip.model_folder import check_model_folder, check_weights, read_config
from megatron_sip.pool_store import num_committed
from megatron_sip.recipe_change import check_recipe
from megatron_sip.run_dir import check_run_dir, refuse_secrets
from megatron_sip.sinks.check import check_sinks
from megatron_sip.supervision.run_lock import refuse_held

SPLITS = ("train", "validation", "test")


def check(
    config: Config,
    *,
    pools_dir: Path | None = None,
    resume: bool = False,
    begun: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse a run that cannot work; torchrun's variables are in `environment`.

    Args:   begun: run.dir holds what an earlier attempt of this launch left, which is replaced.
    Raises: ValueError with one message for each thing that is wrong.
    """
    found = problems(config, servers=pools_dir is None, resume=resume, begun=begun)
    sinks = check_sinks(config) if environment.get("RANK", "0") == "0" else []
    refuse([*_ranks(config, environment), *found, *_pools(config, pools_dir), *sinks])


def problems(
    config: Config, *, servers: bool = True, resume: bool = False, begun: bool = False
) -> tuple[str, ...]:
    """What is wrong with the files and folders that a recipe names.

    Args:   servers: also look at those of servers, judges and rewriter; a replay uses none.
            resume: run.dir must hold a run that can go on, instead of nothing.
            begun: it may hold anything.
    """
    found = [*_run_dir(config, resume, begun), *_data(config), *_folders(config)]
    if servers and config.run.task == "sip":
        found += [*_servers(config), *_prompts(config)]
    return tuple(found)


def _failures(check: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[str]:
    """The message of the ValueError that a call raises, if it does."""
    try:
        check(*args, **kwargs)
    except (OSError, ValueError) as error:
        yield str(error)


def _ranks(config: Config, environment: Mapping[str, str]) -> Iterator[str]:
    """Whether torchrun started what the recipe names, and leaves the servers their GPUs."""
    wanted = config.parallel.world_size
    if "RANK" not in environment:
        yield (
            "RANK is not set: start with torchrun --nproc-per-node "
            f"{wanted} pretrain_sip.py ..., or add --explain"
        )
        return
    started = int(environment["WORLD_SIZE"])
    if started != wanted:
        yield (
            f"torchrun started {started} ranks, but parallel.world_size is {wanted}; make them "
            "equal (--nproc-per-node, or --set)"
        )
    local = int(environment.get("LOCAL_WORLD_SIZE", started))
    for name, server in config.servers.items():
        taken = [g for g in server.gpus if g < local] if isinstance(server, StartServer) else []
        if taken and config.platform.kind == "cuda":
            yield (
                f"servers.{name}.gpus holds {taken}, which trainer ranks use: the {local} ranks of "
                f"this node take GPUs 0 to {local - 1}; name others"
            )


def _run_dir(config: Config, resume: bool, begun: bool) -> Iterator[str]:
    held = [] if begun else list(_failures(refuse_held, config.run.dir))
    if held:  # what the folder holds is its owner's
        yield from held
    elif resume:
        yield from _failures(check_recipe, config)
    elif not begun:
        yield from _failures(check_run_dir, config.run.dir)
    yield from _failures(refuse_secrets, config)


def _data(config: Config) -> Iterator[str]:
    """Tokenizer and datasets, against each other; the checkpoint to start from, against both."""
    path = config.data.tokenizer
    try:
        tokenizer = Tokenizer.load(path)
    except ValueError as error:
        tokenizer = None
        yield f"data.tokenizer: {error}"
    for split in SPLITS:
        try:
            corpus = open_corpus(
                getattr(config.data, split),
                min_tokens=config.data.min_prefix_tokens + config.data.suffix_tokens,
                cache_dir=config.data.cache_dir,
            )
            if tokenizer:
                corpus.check_tokenizer(tokenizer.digest, path=path)
            for part in corpus.parts:
                part.check_indexes()
        except ValueError as error:
            yield f"data.{split}: {error}"
    if tokenizer and tokenizer.vocab_size > config.model.vocabulary(tokenizer.vocab_size):
        yield (
            f"data.tokenizer {path} has {tokenizer.vocab_size} pieces, more than model.vocab_size "
            f"{config.model.vocab_size}; leave model.vocab_size out"
        )
    init = config.model.init
    if init.kind == "huggingface":
        yield from (f"model.init.path: {m}" for m in _check_folder(config, init.path, tokenizer))
    if init.kind == "megatron":
        yield from (f"model.init.path: {m}" for m in _failures(_check_init, config, tokenizer))


def _check_folder(config: Config, folder: Path, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Whether a Hugging Face folder holds the weights of the recipe's model."""
    try:
        yield from agreement_problems(config.model, folder, tokenizer)
    except (OSError, ValueError) as error:
        yield str(error)
    else:
        yield from _failures(check_weights, folder)


def _check_init(config: Config, tokenizer: Tokenizer | None) -> None:
    """Whether the first weights are there, and of this model."""
    assert config.model.init.kind == "megatron"
    folder = checkpoint_files.find(config.model.init.path)
    identity = {}
    if tokenizer:
        identity = checkpoint_files.model_identity(
            config.model, vocab_size=config.model.vocabulary(tokenizer.vocab_size),
            tokenizer_digest=tokenizer.digest,
        )  # fmt: skip
    checkpoint_files.check_identity(folder, identity)


def _folders(config: Config) -> Iterator[str]:
    """Whether what the run will write can be written."""
    wanted = {"run.dir": config.run.dir}
    if config.judge:
        wanted["judge.cache_dir"] = config.judge.cache_dir
    for key, path in wanted.items():
        there = existing(path)
        if not there.is_dir() and there != Path(path).absolute():
            yield f"{key} {path}: {there} is a file; name a folder"
        elif not os.access(there, os.W_OK):
            yield f"{key} {path}: no permission to write in {there}; name another folder"


def existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    path = Path(path).absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _servers(config: Config) -> Iterator[str]:
    for name, server in config.servers.items():
        if isinstance(server, ConnectServer):
            yield from (f"servers.{name}.api_key_env: {m}" for m in _failures(api_key, server))
            if server.tokenizer is None:
                continue  # who needs it says so
            folder, key = server.tokenizer, f"servers.{name}.tokenizer"
        elif server.model == "policy":
            continue
        else:
            folder, key = Path(server.model), f"servers.{name}.model"
        found = list(_failures(check_model_folder, folder))
        yield from (f"{key} {message}" for message in found)
        if isinstance(server, StartServer) and not found:
            yield from (f"{key} {m}" for m in _failures(check_weights, folder))
            yield from (f"servers.{name}." + m for m in _failures(_check_length, server, folder))


def _check_length(server: StartServer, folder: Path) -> None:
    longest = read_config(folder).get("max_position_embeddings")
    if isinstance(longest, int) and server.max_model_len > longest:
        raise ValueError(
            f"max_model_len {server.max_model_len} is more than the {longest} positions of "
            f"{folder} (max_position_embeddings); lower it"
        )


def _prompts(config: Config) -> Iterator[str]:
    """Whether each prompt exists and shows the model what its form is about."""
    assert config.judge is not None
    for i, criterion in enumerate(config.judge.criteria):
        if isinstance(criterion, PromptedCriterion):
            found = _failures(_check_prompt, criterion.prompt, criterion.form)
            yield from (f"judge.criteria[{i}].prompt: {message}" for message in found)
    trust = config.judge.trust
    if trust and isinstance(trust.second, PromptedCriterion):
        found = _failures(_check_prompt, trust.second.prompt, trust.second.form)
        yield from (f"judge.trust.second.prompt: {message}" for message in found)
    if trust and trust.calibration:
        found = _failures(_check_pairs, config, trust.calibration)
        yield from (f"judge.trust.calibration: {message}" for message in found)
    if config.rewriter:
        found = _failures(_check_prompt, config.rewriter.prompt, "rewrite")
        yield from (f"rewriter.prompt: {message}" for message in found)


def _check_pairs(config: Config, path: Path) -> None:
    assert config.judge is not None
    pairs = read_pairs(path)
    for criterion in config.judge.criteria:
        if not isinstance(criterion, PromptedCriterion) or criterion.canary != "spoiled":
            continue
        if "suffix" in load_prompt(criterion.prompt).placeholders:
            check_suffixes(pairs, path)


def _check_prompt(name: str, form: str) -> None:
    check_form(load_prompt(name), form)


def _pools(config: Config, pools_dir: Path | None) -> Iterator[str]:
    if pools_dir is None:
        return
    steps = num_committed(pools_dir)
    if steps < config.run.steps:
        remedy = f"set run.steps to {steps}" if steps else "give the pools/ folder of a run"
        if any(pools_dir.glob("step_*.done")) and not steps:
            remedy = "its first ones were removed (run.keep_pools), so it cannot be replayed"
        yield (
            f"--pools {pools_dir} holds {steps} committed steps (step_00000000.done, ...), "
            f"run.steps is {config.run.steps}; {remedy}"
        )
