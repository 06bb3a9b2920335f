"""Rewrites of all samples that a run will draw, made before it.

Replies go to the recipe's cache under the keys that the run looks them up by, so the run pays for
none; the shards hold the same as a table to read. See `shards.py` for files and `unsafe.py` for
what is known to be unsafe.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sip.config import Config, ConnectServer
from megatron_sip.data.blended_corpus import BlendedCorpus
from megatron_sip.data.folder_lock import locked_folder
from megatron_sip.data.positions import open_train
from megatron_sip.data.sampler import CUT, PrefixSuffixSampler
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import RunFailed
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.rewriting.acceptance import FAILED, RULES
from megatron_sip.rewriting.rewriter import Rewrite, Rewriter, RewriterFailed
from megatron_sip.rewriting.shards import SHARD_SAMPLES, Shards
from megatron_sip.rewriting.unsafe import UnsafeDocuments
from megatron_sip.services import served_model
from megatron_sip.serving.client import Endpoint
from megatron_sip.serving.supervisor import Supervisor
from megatron_sip.serving.text_fleet import text_fleet
from megatron_sip.types import SipSample

ENOUGH = 20  # samples, before the share of failures means something
SENT_AT_ONCE = 16  # times rewriter.concurrency: samples whose prompts are in memory


class RewritesFailed(RunFailed):
    """Too many samples got no reply."""


@dataclass(frozen=True)
class Pass:
    """What to go over and where to put it."""

    output: Path
    passes: int | None = None
    """Over the eligible documents; None: see num_samples."""
    num_samples: int | None = None
    """The first samples of the run; None with no passes: all that the run draws."""
    resume: bool = False
    unsafe_mask: str = ""
    """Mask of the documents that are known to be unsafe, PREFIX.NAME; "": nothing is known."""
    max_failed: float = 0.05
    """Largest share of samples without a reply."""


def rewrite_corpus(
    config: Config,
    settings: Pass,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Counter[str]:
    """Ask for every rewrite that is not there yet.

    Args:    say: told when the server is started, waited for or started anew.
    Returns: outcomes of all samples of the pass, earlier ones included.
    Raises:  ValueError if recipe, data or output contradict the pass; RewritesFailed,
             RewriterFailed or ServerFailed if the server does not do its work. Whole shards stay.
    """
    if config.rewriter is None or config.judge is None:
        raise ValueError("the recipe has no [rewriter]; add one, see docs/rewriting.md")
    corpus, sampler = open_train(config)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    server = _server_model(config)
    unsafe = UnsafeDocuments(corpus, settings.unsafe_mask, cache_dir=config.data.cache_dir)
    with locked_folder(settings.output):
        shards = Shards(
            settings.output,
            _identity(config, corpus, tokenizer, server=server) | {"unsafe mask": unsafe.digest},
            num_samples=_num_samples(config, settings, sampler),
            resume=settings.resume,
        )
        if shards.pending:
            with _open_rewriter(
                config, server, tokenizer, log_dir=settings.output / "logs", say=say
            ) as (rewriter, servers):
                write = partial(_written, rewriter, servers, seed=config.run.seed)
                _write_all(shards, write, config, sampler, tokenizer, unsafe=unsafe,
                           max_failed=settings.max_failed)  # fmt: skip
        shards.finish()
    return shards.outcomes


def _num_samples(config: Config, settings: Pass, sampler: PrefixSuffixSampler) -> int:
    """Samples to go over, from 0 on."""
    if settings.passes is not None and settings.num_samples is not None:
        raise ValueError("--passes and --samples exclude each other; give one")
    if settings.passes is not None:
        found = settings.passes * sampler.num_eligible
    elif settings.num_samples is not None:
        found = settings.num_samples
    else:
        found = config.run.steps * config.data.global_batch_size
    if found < 1:
        raise ValueError(f"{found} samples: --passes and --samples must be at least 1")
    return found


def _server_model(config: Config) -> ServedModel:
    """Identity of the rewriter's model, before its server is there."""
    assert config.rewriter is not None
    name = config.rewriter.server
    server = config.servers[name]
    if isinstance(server, ConnectServer):
        return served_model(config, name, Endpoint(name, server.url, server.model))
    if server.model == "policy":
        raise ValueError(
            f"rewriter.server {name} serves the policy, which changes while it is trained; name a "
            "server of another model"
        )
    return served_model(config, name, Endpoint(name, "http://localhost", name))


def _identity(
    config: Config, corpus: BlendedCorpus, tokenizer: Tokenizer, *, server: ServedModel
) -> dict[str, str]:
    """All that the rows depend on, by the name of the field."""
    settings, data = config.rewriter, config.data
    assert settings is not None
    prompt = load_prompt(settings.prompt)
    found = {f"data.{key}": value for key, value in corpus.identity("train").items()} | {
        "data.tokenizer": tokenizer.digest,
        "cut of documents": CUT,
        "run.seed": config.run.seed,
        "rewriter.prompt": f"{prompt.name} {prompt.digest}",
        "rewriter.server, model": f"{server.endpoint.model} {server.model_digest}",
        "rewriter.server, tokenizer": server.tokenizer.digest if server.tokenizer else "",
        "rules": RULES,
        "samples of a shard": SHARD_SAMPLES,
    }
    for key in ("prefix_tokens", "min_prefix_tokens", "suffix_tokens"):
        found[f"data.{key}"] = getattr(data, key)
    for key in ("temperature", "top_p", "prefix_tokens", "max_tokens"):
        found[f"rewriter.{key}"] = getattr(settings, key)
    return {key: str(value) for key, value in found.items()}


@contextmanager
def _open_rewriter(
    config: Config,
    server: ServedModel,
    tokenizer: Tokenizer,
    *,
    log_dir: Path,
    say: Callable[[str], None],
) -> Iterator[tuple[Rewriter, Supervisor]]:
    """The recipe's rewriter, with its server started or reached."""
    assert config.rewriter is not None and config.judge is not None
    name = config.rewriter.server
    with ExitStack() as stack:
        servers = stack.enter_context(text_fleet(config, [name], log_dir=log_dir, say=say))
        cache = Cache(config.judge.cache_dir)
        stack.callback(cache.close)
        rewriter = Rewriter(
            config.rewriter,
            server=replace(server, endpoint=servers.endpoints()[name]),
            cache=cache,
            tokenizer=tokenizer,
            suffix_tokens=config.data.suffix_tokens,
        )
        yield rewriter, servers


def _written(
    rewriter: Rewriter,
    servers: Supervisor,
    samples: Sequence[SipSample],
    *,
    seed: int,
    unsafe: Sequence[bool | None],
) -> list[Rewrite]:
    """Rewrites of samples, asked for again after a server that died came back.

    Raises: RewriterFailed if it is not asked again; ServerFailed if the restarts are spent.
    """
    while True:
        try:
            rewrites = rewriter.write(samples, seed=seed, unsafe=unsafe)
        except RewriterFailed:
            if not servers.settle():
                raise
            continue
        if not any(r.outcome == FAILED for r in rewrites) or not servers.settle():
            return rewrites


def _write_all(
    shards: Shards,
    write: Callable[..., list[Rewrite]],
    config: Config,
    sampler: PrefixSuffixSampler,
    tokenizer: Tokenizer,
    *,
    unsafe: UnsafeDocuments,
    max_failed: float,
) -> None:
    """Fill the shards that are missing. Raises: RewritesFailed as soon as too many failed."""
    assert config.rewriter is not None
    chunk = SENT_AT_ONCE * config.rewriter.concurrency
    done = 0
    failures: list[str] = []
    with _progress(sum(len(shards.samples_of(n)) for n in shards.pending)) as advance:
        for number in shards.pending:
            wanted = shards.samples_of(number)
            samples: list[SipSample] = []
            rewrites, suffixes = [], []
            for first in range(0, len(wanted), chunk):
                part = [sampler[i] for i in wanted[first : first + chunk]]
                rewrites += write(part, unsafe=[unsafe.known(s) for s in part])
                suffixes += [
                    tokenizer.continuation_text(s.prefix_ids, s.suffix_ids)[1] for s in part
                ]
                samples += part
                done += len(part)
                failures += [r.failure for r in rewrites[first:] if r.outcome == FAILED]
                if done >= ENOUGH:
                    _check_failures(failures, done, max_failed)
                advance(len(part))
            shards.write(number, samples, suffixes, rewrites)
    _check_failures(failures, done, max_failed)


def _check_failures(failures: Sequence[str], done: int, max_failed: float) -> None:
    """Raises: RewritesFailed if more than the share `max_failed` of `done` samples failed."""
    if len(failures) > max_failed * done:
        raise RewritesFailed(
            f"rewriter: {len(failures)} of {done} samples have no reply, --max-failed is "
            f"{max_failed:.1%}; for example: {failures[-1]}; read the server's log, then go on "
            "with --resume; replies that were given are in the cache"
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A line on stderr: samples, rewrites a second, time left. Args: total: samples to come."""
    columns = (
        BarColumn(20),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} samples"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, start_s = progress.add_task("rewrite", total=total, rate=""), time.monotonic()

        def advance(count: int) -> None:
            progress.advance(task, count)
            seconds = max(time.monotonic() - start_s, 1e-9)
            rate = f"{progress.tasks[0].completed / seconds:,.1f} rewrites/s"
            progress.update(task, rate=rate)

        yield advance
