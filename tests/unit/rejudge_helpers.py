"""A small ledger that a scripted judge has scored, and recipes for judging it again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from judge_helpers import labels_reply, likelihood_reply, make_model_folder

from megatron_sip.config import Config
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.pool_store import PoolRecord, commit_step, write_pools
from megatron_sip.recipe import load_config
from megatron_sip.serving.client import Endpoint
from megatron_sip.types import Candidate, CandidatePool, Pick, PoolRewards, SipSample

QUALITY = {
    "form": "pairwise", "name": "quality", "server": "judge", "prompt": "quality_pairwise_v1",
}  # fmt: skip
FIT = {"form": "likelihood", "name": "fit", "server": "judge"}
SOURCES = ("suffix", "rewrite", "rollout", "rollout")


class GoodnessJudge:
    """Prefers texts with more of the word "good"; `inverse` prefers fewer. Counts questions."""

    def __init__(self, folder: Path, *, inverse: bool = False, first_helps: float = 0.0) -> None:
        self.tokenizer = JudgeTokenizer(folder)
        self.sign = -1 if inverse else 1
        self.first_helps = first_helps
        self.num_asked = 0
        self.before: Callable[[int], Any] = lambda n: None  # a reply of its own to question n

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/health":
            return {}
        self.num_asked += 1
        other = self.before(self.num_asked)
        if other is not None:
            return other
        text = self.tokenizer._trusted.decode(body["prompt"])
        if "prompt_logprobs" in body:
            return likelihood_reply(body, -10.0 + self.sign * min(9, text.count("good")))
        first, second = (text.index(f"Continuation {i}:") for i in (1, 2))
        lead = text[first:second].count("good") - text[second:].count("good")
        chance = 1 / (1 + math.exp(-self.sign * lead - self.first_helps))
        one, two = (self.tokenizer.label_id(x) for x in "12")
        return labels_reply({one: math.log(chance), two: math.log(1 - chance)})


def model_folder(folder: Path) -> Path:
    """A tokenizer for judge and policy alike."""
    make_model_folder(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def recipe(folder: Path, url: str, model: Path, *, judge: dict[str, Any] | None = None) -> Path:
    """A recipe whose judge is reached at `url` and serves "judge"."""
    connected = {"kind": "connect", "url": url, "model": "judge", "tokenizer": str(model)}
    policy = {"kind": "start", "model": "policy", "max_model_len": 96}
    tree = {
        "run": {"task": "sip", "dir": str(folder / "run"), "steps": 40, "seed": 5},
        "platform": {"kind": "cpu"},
        "model": {
            "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 128, "num_attention_heads": 4,
            "num_query_groups": 2, "max_sequence_length": 96,
        },
        "parallel": {"world_size": 1},
        "optimizer": {"lr": 1e-4},
        "data": {
            "tokenizer": str(model / "tokenizer.json"), "train": str(folder / "train"),
            "validation": "none", "test": "none", "prefix_tokens": 64, "min_prefix_tokens": 32,
            "suffix_tokens": 32, "global_batch_size": 2, "micro_batch_size": 1,
        },
        "servers": {"policy": policy, "judge": connected},
        "rollout": {
            "server": "policy", "num_rollouts": 2, "weight_transfer": "shared_memory",
            "max_logprob_mismatch": 1e-3,
        },
        "judge": {
            "cache_dir": str(folder / "cache"), "criteria": [QUALITY], "timeout_s": 5.0,
            "outage_patience_s": 0.0, "both_orders": 0.0,
        } | (judge or {}),
        "objective": {"name": "dpo", "pair_sources": ["rollout"]},
        "curriculum": {"kind": "emergent", "sources": ["suffix", "rollout"]},
        "checkpoint": {"interval": 20},
        "evaluation": {"num_prefixes": 16, "server": "judge", "bootstrap": 200},
    }  # fmt: skip
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def make_pool(number: int, tokenizer: Tokenizer) -> CandidatePool:
    """Four candidates, each with another number of the word "good", in an order by `number`."""
    prefix = f"Once {number} there was"
    order = np.random.default_rng(number).permutation(4)
    texts = [" good" * int(n) + f" end {i}" for i, n in enumerate(order)]
    ids = [np.array(tokenizer.encode(text), np.int32) for text in (prefix, *texts)]
    none = np.zeros(0, np.float32)
    candidates = tuple(
        Candidate(source, x, text, none, 0 if source == "rollout" else -1, "length")
        for source, text, x in zip(SOURCES, texts, ids[1:], strict=True)
    )
    return CandidatePool(SipSample(number, number, 4, ids[0], ids[1]), prefix, candidates, 0.5)


def write_ledger(
    run_dir: Path, pools: Sequence[CandidatePool], rewards: Sequence[PoolRewards], *, shards: int
) -> None:
    """Steps of as many pools as shards; the best candidate is chosen, the worst rejected."""
    for step in range(len(pools) // shards):
        for rank in range(shards):
            pool, found = pools[step * shards + rank], rewards[step * shards + rank]
            best, worst = int(np.nanargmax(found.total)), int(np.nanargmin(found.total))
            picks = (Pick(best, "chosen", 0.0, 1.0), Pick(worst, "rejected", 0.0, 1.0))
            record = PoolRecord(step, rank, pool, found, (), picks)
            write_pools(run_dir, step, dp_rank=rank, records=[record])
        commit_step(run_dir, step, num_shards=shards)


def judged_run(folder: Path, path: Path, *, num_pools: int = 8, shards: int = 2) -> Config:
    """A ledger in folder/run of what the recipe at `path` gives its own pools."""
    config = load_config(path)
    assert config.judge is not None
    server = config.servers["judge"]
    assert server.kind == "connect" and server.tokenizer is not None
    tokenizer = Tokenizer.load(config.data.tokenizer)
    pools = [make_pool(n, tokenizer) for n in range(num_pools)]
    endpoint = Endpoint("judge", server.url, server.model)
    cache = Cache(config.judge.cache_dir)
    judge = Judge(
        config.judge.criteria,
        servers={"judge": ServedModel(endpoint, JudgeTokenizer(server.tokenizer), server.model)},
        cache=cache,
        settings=config.judge,
        prefix_text=lambda sample, n: tokenizer.decode(sample.prefix_ids[-n:]),
        suffix_text=lambda sample: "",
    )
    rewards, _, _ = judge.judge_pools(pools, seed=config.run.seed)
    cache.close()
    write_ledger(folder / "run", pools, rewards, shards=shards)
    return config
