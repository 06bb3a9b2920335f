"""The judges' servers of a recipe outside of a run: started or reached, ended with the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config import Config, StartServer
from megatron_sip.config_judge import NoveltyCriterion, PromptedCriterion
from megatron_sip.data.blended_corpus import open_corpus
from megatron_sip.data.frequencies import pair_frequencies
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.novelty import Novelty
from megatron_sip.judge.prompts import check_form, load_prompt
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.serving.text_fleet import text_fleet


@dataclass(frozen=True)
class JudgeServers:
    """What a `Judge` is made of, beside criteria and texts."""

    servers: dict[str, ServedModel]
    cache: Cache


def judge_server_names(config: Config) -> tuple[str, ...]:
    """Servers that the criteria of [judge] ask, without the policy's.

    Raises: ValueError if there is no [judge], or a criterion asks the policy, which only a run has.
    """
    if config.judge is None:
        raise ValueError("the recipe has no [judge] section, so nobody to ask; name another recipe")
    asked = [c for c in config.judge.criteria if not isinstance(c, NoveltyCriterion)]
    for criterion in asked:
        for name in criterion.servers:
            server = config.servers[name]
            if isinstance(server, StartServer) and server.model == "policy":
                raise ValueError(
                    f"judge criterion {criterion.name} asks server {name}, the policy of a run; "
                    "give its exported weights as a server of their own"
                )
    return tuple(dict.fromkeys(name for c in asked for name in c.servers))


def check_prompts(config: Config) -> None:
    """Raises: ValueError if a criterion's prompt is missing or not for its form."""
    for criterion in config.judge.criteria if config.judge else ():
        if isinstance(criterion, PromptedCriterion):
            check_form(load_prompt(criterion.prompt), criterion.form)


def policy_tokenizer(config: Config) -> Tokenizer | None:
    """data.tokenizer; None if no criterion reads token ids of prefix, suffix or candidate."""
    assert config.judge is not None
    asks_by_ids = any(not isinstance(c, PromptedCriterion) for c in config.judge.criteria)
    needed = asks_by_ids or shows_suffix(config)
    return Tokenizer.load(config.data.tokenizer) if needed else None


def shows_suffix(config: Config) -> bool:
    """Whether the prompt of a criterion shows how the text really goes on."""
    criteria = config.judge.criteria if config.judge else ()
    prompts = [load_prompt(c.prompt) for c in criteria if isinstance(c, PromptedCriterion)]
    return any("suffix" in prompt.placeholders for prompt in prompts)


def novelty_of(config: Config, tokenizer: Tokenizer | None) -> Novelty | None:
    """Pair frequencies of data.train; None if no criterion counts.

    Raises: ValueError if data.train was made with another tokenizer.
    """
    assert config.judge is not None
    if not any(isinstance(c, NoveltyCriterion) for c in config.judge.criteria):
        return None
    assert tokenizer is not None
    corpus = open_corpus(
        config.data.train,
        min_tokens=config.data.min_prefix_tokens + config.data.suffix_tokens,
        cache_dir=config.data.cache_dir,
    )
    corpus.check_tokenizer(tokenizer.digest, path=config.data.tokenizer)
    return Novelty(pair_frequencies(corpus), tokenizer.eod)


@contextmanager
def open_servers(
    config: Config, *, log_dir: Path, say: Callable[[str], None]
) -> Iterator[JudgeServers]:
    """The judges' servers and the cache of verdicts; arguments as those of `text_fleet`.

    Raises: ValueError as `judge_server_names`; ServerFailed if one does not come up.
    """
    from megatron_sip.services import served_model  # torch comes with it, so not before it is used

    names = judge_server_names(config)
    assert config.judge is not None
    with ExitStack() as stack:
        cache = Cache(config.judge.cache_dir)
        stack.callback(cache.close)
        servers = stack.enter_context(text_fleet(config, names, log_dir=log_dir, say=say))
        endpoints = servers.endpoints()
        yield JudgeServers({n: served_model(config, n, endpoints[n]) for n in names}, cache)
