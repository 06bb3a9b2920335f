"""Rules that span sections of a recipe. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_sip.config_judge import NoveltyCriterion, PromptedCriterion
from megatron_sip.config_model import model_rules
from megatron_sip.config_rules_objective import reference_rules, source_rules

if TYPE_CHECKING:
    from megatron_sip.config import Config

LOOPBACK = ("localhost", "127.0.0.1", "::1")
COLLECTIVE_TIMEOUT_S = 1800  # of parallel.py
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM 0.32


def broken_rules(config: Config) -> list[str]:
    """What contradicts itself: one sentence each with key, value and rule; empty if nothing."""
    return [message for holds, message in _rules(config) if not holds]


def _rules(c: Config) -> list[tuple[bool, str]]:
    """(holds, message) for each rule that spans sections."""
    m, p, d = c.model, c.parallel, c.data
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    ep, num_experts = p.expert_model_parallel_size, m.experts.num_experts if m.experts else 0
    sections = {"servers": c.servers, "rollout": c.rollout, "judge": c.judge}
    rules = [
        *model_rules(m),
        (m.num_query_groups % tp == 0,
         f"model.num_query_groups {m.num_query_groups} must be a multiple of "
         f"parallel.tensor_model_parallel_size {tp}; lower the latter"),
        (m.ffn_hidden_size % tp == 0,
         f"model.ffn_hidden_size {m.ffn_hidden_size} must be a multiple of "
         f"parallel.tensor_model_parallel_size {tp}"),
        (m.experts is None or tp == 1 or p.sequence_parallel,
         f"parallel.tensor_model_parallel_size {tp} with [model.experts] needs "
         "parallel.sequence_parallel = true, without which Megatron-Core does not train experts"),
        (ep == 1 or m.experts is not None,
         f"parallel.expert_model_parallel_size {ep} needs [model.experts]; leave it out"),
        (num_experts % ep == 0,
         f"model.experts.num_experts {num_experts} must be a multiple of "
         f"parallel.expert_model_parallel_size {ep}"),
        (p.data_parallel_size % ep == 0,
         f"parallel.expert_model_parallel_size {ep} must divide the data-parallel size "
         f"{p.data_parallel_size} = world_size / (TP x PP), over whose ranks experts are spread"),
        (m.num_layers % pp == 0,
         f"model.num_layers {m.num_layers} must be a multiple of "
         f"parallel.pipeline_model_parallel_size {pp}"),
        (p.world_size % (tp * pp) == 0,
         f"parallel.world_size {p.world_size} must be a multiple of TP x PP = {tp * pp}"),
        (d.global_batch_size % (d.micro_batch_size * max(1, p.data_parallel_size)) == 0,
         f"data.global_batch_size {d.global_batch_size} must be a multiple of "
         f"data.micro_batch_size x data-parallel size = "
         f"{d.micro_batch_size} x {p.data_parallel_size}"),
        *((count >= p.data_parallel_size,
           f"evaluation.{key} {count} must not be below the data-parallel size "
           f"{p.data_parallel_size}: each replica evaluates one prefix at least")
          for key, count in _evaluated(c)),
        (d.min_prefix_tokens <= d.prefix_tokens,
         f"data.min_prefix_tokens {d.min_prefix_tokens} must not exceed data.prefix_tokens "
         f"{d.prefix_tokens}"),
        (d.prefix_tokens + d.suffix_tokens <= m.max_sequence_length,
         f"data.prefix_tokens + data.suffix_tokens = {d.prefix_tokens + d.suffix_tokens} must "
         f"not exceed model.max_sequence_length {m.max_sequence_length}"),
        *_blends(c),
        (c.optimizer.warmup_steps < c.run.steps,
         f"optimizer.warmup_steps {c.optimizer.warmup_steps} must be below run.steps "
         f"{c.run.steps}"),
        (c.optimizer.min_lr <= c.optimizer.lr,
         f"optimizer.min_lr {c.optimizer.min_lr} must not exceed optimizer.lr {c.optimizer.lr}"),
        (c.platform.kind == "cuda" or (c.platform.fp8 is None and not p.sequence_parallel),
         'platform.fp8 and parallel.sequence_parallel need platform.kind = "cuda"'),
    ]  # fmt: skip
    rules += reference_rules(c)
    if c.run.task == "ntp":
        rules += [
            (not v, f'run.task = "ntp" uses no [{k}]; remove it') for k, v in sections.items()
        ]
        rules.append((c.objective.name == "nll", 'run.task = "ntp" needs objective.name = "nll"'))
        return rules
    rules += [(bool(v), f'run.task = "sip" needs a [{k}] section') for k, v in sections.items()]
    rules.append((c.curriculum is not None, 'run.task = "sip" needs a [curriculum] section'))
    return rules + _sip_rules(c) if all(holds for holds, _ in rules) else rules


def _evaluated(c: Config) -> Iterator[tuple[str, int]]:
    """(key, number) of the prefixes of each kind of evaluation."""
    yield "num_prefixes", c.evaluation.num_prefixes
    if c.evaluation.interval is not None:
        yield "interval_prefixes", c.evaluation.interval_prefixes


def _blends(c: Config) -> Iterator[tuple[bool, str]]:
    """(rule holds, message) for the parts of each blend."""
    for split in ("train", "validation", "test"):
        parts = getattr(c.data, split)
        if isinstance(parts, str):
            continue
        names = ("weight", "epochs", "tokens")
        measures = [tuple(n for n in names if getattr(part, n) is not None) for part in parts]
        yield bool(parts), f"data.{split} has no part; give one at least"
        yield (
            len(set(measures)) <= 1 and all(len(measure) == 1 for measure in measures),
            f"data.{split}: each part must give one of weight, epochs and tokens, and all the same "
            f"one; found {', '.join('+'.join(m) or 'none' for m in measures)}",
        )


def _sip_rules(c: Config) -> list[tuple[bool, str]]:
    """Rules on servers, sources and objective of a valid SIP recipe."""
    assert c.rollout and c.judge and c.curriculum
    users = {_nth("rollout.server", n): name for n, name in enumerate(c.rollout.servers)}
    users["evaluation.server"] = c.evaluation.server
    users |= {
        _nth(f"judge.criteria[{i}].server", n): name
        for i, x in enumerate(c.judge.criteria)
        if not isinstance(x, NoveltyCriterion)
        for n, name in enumerate(x.servers)
    }
    second = c.judge.trust.second if c.judge.trust else None
    if second:
        users |= {f"judge.trust.second.server[{n}]": x for n, x in enumerate(second.servers)}
    if c.rewriter:
        users["rewriter.server"] = c.rewriter.server
    rules = [
        (name in c.servers, f'{key} names server "{name}", but recipe has {sorted(c.servers)}')
        for key, name in users.items()
    ]
    sources = set(c.curriculum.sources)
    names = [x.name for x in c.judge.criteria]
    rules += [
        ("rewrite" not in sources or c.rewriter is not None,
         'curriculum.sources contains "rewrite", which needs a [rewriter] section'),
        ("rewrite" in sources or c.rewriter is None,
         '[rewriter] is given, but curriculum.sources has no "rewrite"; add it or remove the '
         "section"),
        (len({*names, "chosen", "rejected"}) == len(names) + 2,
         f'judge.criteria names must differ, and not be "chosen" or "rejected"; got {names}'),
        (c.parallel.world_size == 1
         or c.judge.outage_patience_s + 2 * c.judge.timeout_s < COLLECTIVE_TIMEOUT_S,
         f"judge.outage_patience_s {c.judge.outage_patience_s:g} and twice judge.timeout_s "
         f"{c.judge.timeout_s:g} must be below {COLLECTIVE_TIMEOUT_S} s together: the other ranks "
         "wait no longer"),
        (c.judge.limit.money is None
         or any(s.prompt_price + s.completion_price for s in c.servers.values()
                if s.kind == "connect"),
         f"judge.limit.money is {c.judge.limit.money}, but no server has a price; give "
         "servers.NAME.prompt_price and completion_price"),
        (c.evaluation.interval is None
         or c.evaluation.interval % c.rollout.sync_interval == 0,
         f"evaluation.interval {c.evaluation.interval} must be a multiple of "
         f"rollout.sync_interval {c.rollout.sync_interval}: the server samples what is evaluated"),
        (c.rollout.weight_transfer != "nccl" or c.platform.kind == "cuda",
         'rollout.weight_transfer = "nccl" needs platform.kind = "cuda"; use "shared_memory"'),
        (c.rollout.weight_transfer != "shared_memory" or c.platform.kind == "cpu",
         'rollout.weight_transfer = "shared_memory" works on the CPU only; use "nccl"'),
    ]  # fmt: skip
    return [
        *rules, *_server_rules(c), *_tokenizer_rules(c, users), *_rollout_rules(c), *source_rules(c)
    ]  # fmt: skip


def _nth(key: str, n: int) -> str:
    """How the n-th name of a key is called that holds one name or several."""
    return key + ("" if n == 0 else f"[{n}]")


def _rollout_rules(c: Config) -> Iterator[tuple[bool, str]]:
    """What the servers that serve the policy must have in common, and be able to serve."""
    assert c.rollout
    names = c.rollout.servers
    yield bool(names), "rollout.server names no server; name one at least"
    yield (
        len(set(names)) == len(names),
        f"rollout.server names a server twice: {list(names)}; name each once",
    )
    yield (
        c.parallel.world_size == 1 or c.rollout.sync_timeout_s < COLLECTIVE_TIMEOUT_S,
        f"rollout.sync_timeout_s {c.rollout.sync_timeout_s:g} must be below "
        f"{COLLECTIVE_TIMEOUT_S}: the other ranks wait no longer",
    )
    started = {n: s for n in names if (s := c.servers.get(n)) is not None and s.kind == "start"}
    dtypes = {server.dtype for server in started.values()}
    yield (
        len(dtypes) <= 1,
        f"rollout.server: dtypes of {sorted(started)} differ ({sorted(dtypes)}); give all the "
        "same: a rollout must not depend on who answers",
    )
    head = c.model.head_dim
    yield (
        not started or c.platform.kind != "cpu" or head in CPU_HEAD_SIZES,
        f"the size of a head is {head} (model.kv_channels, or model.hidden_size / "
        f"model.num_attention_heads): vLLM on the CPU has attention for heads of "
        f"{CPU_HEAD_SIZES} only",
    )
    row, limit = c.data.prefix_tokens + c.data.suffix_tokens, c.model.max_sequence_length
    for name, server in started.items():
        yield (
            row <= server.max_model_len <= limit,
            f"servers.{name}.max_model_len {server.max_model_len} must be at "
            f"least data.prefix_tokens + data.suffix_tokens = {row} and at most "
            f"model.max_sequence_length {limit}",
        )


def _tokenizer_rules(c: Config, users: dict[str, str]) -> Iterator[tuple[bool, str]]:
    """Only a server that is asked for reasoned answers and nothing else can do without."""
    assert c.rollout and c.judge
    reasoned = {
        _nth(f"judge.criteria[{i}].server", n)
        for i, criterion in enumerate(c.judge.criteria)
        if isinstance(criterion, PromptedCriterion) and criterion.answer.kind == "reasoned"
        for n in range(len(criterion.servers))
    }
    for key, name in users.items():
        server = c.servers.get(name)
        if server is not None and server.kind == "connect" and key not in reasoned:
            yield (
                server.tokenizer is not None or key.startswith("rollout.server"),
                f"{key} sends token ids to servers.{name}, which has no tokenizer; give "
                f"servers.{name}.tokenizer, or read verdicts from reasoned answers",
            )


def _server_rules(c: Config) -> list[tuple[bool, str]]:
    """What each server may be: where it runs, what it serves, who may reach it."""
    assert c.rollout
    rules: list[tuple[bool, str]] = []
    policies = ", ".join(f'"{name}"' for name in c.rollout.servers)
    taken: dict[int, str] = {}
    for name, server in c.servers.items():
        if server.kind == "connect":
            host = urlsplit(server.url).hostname or ""
            rules.append(
                (bool(server.api_key_env) or host in LOOPBACK,
                 f"servers.{name}.url: host {host!r} is not this machine, and no key guards it: "
                 "name the environment variable of its key in api_key_env"))  # fmt: skip
            continue
        rules += [
            ((server.model == "policy") == (name in c.rollout.servers),
             f'servers.{name}.model is "{server.model}", rollout.server is {policies}: '
             'what it names, and no other, serves "policy"'),
            (c.platform.kind == "cuda" or not server.gpus,
             f'servers.{name}.gpus is {list(server.gpus)}, but platform.kind is "cpu"; remove it'),
            (c.platform.kind == "cpu" or bool(server.gpus),
             f'servers.{name}.gpus is empty, but platform.kind is "cuda"; list its devices'),
        ]  # fmt: skip
        rules += [
            (gpu not in taken,
             f"servers.{name}.gpus and servers.{taken.get(gpu)}.gpus both hold {gpu}; "
             "a GPU serves one of them")
            for gpu in server.gpus
        ]  # fmt: skip
        taken |= dict.fromkeys(server.gpus, name)
    return rules
