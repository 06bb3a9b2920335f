"""Benchmark `judge-client`: verdicts a second, one request each, from a server that takes 50 ms.

The server is `judge_stub`, a process of its own; `stub_alone_per_s` is its rate where the client
sends ready bytes and does no work. Everything on our side is the real judge: prompt, tokenizer,
cache on the disk, HTTP client. Sequential is the same code with one question in flight. Memory is
the peak of this process (ru_maxrss), which never falls: what it grows after the first 10,000
verdicts is what more verdicts cost. `verdicts_per_cpu_s` is what one core of its own would give,
where other work disturbs the rest.
"""

from __future__ import annotations

import asyncio
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from megatron_sip import config_judge
from megatron_sip.benchmark.judge_pools import CANDIDATES, JUDGE, judge_pools
from megatron_sip.benchmark.judge_stub import MODEL, judge_stub
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.serving.client import Endpoint
from megatron_sip.types import CandidatePool

VERDICTS, WARM_UP = 50_000, 10_000
LATENCY_S = 0.05
CONCURRENCY = 128
POOLS_A_CALL = 16
PROMPT = "quality_pairwise_v2"
SEED = 1
_QUESTIONS = CANDIDATES * (CANDIDATES - 1) // 2  # of a pool
_ORDER_POOLS = 8  # whose order is checked
_ALONE = 20_000  # requests that measure the stub


def run() -> dict[str, Any]:
    """Measure. Raises: ValueError if verdicts are missing or not in the order of the questions."""
    tokenizer = JudgeTokenizer(JUDGE)
    labels = [tokenizer.label_id(label) for label in load_prompt(PROMPT).labels]
    pools = judge_pools()
    with tempfile.TemporaryDirectory() as root:
        folders = (Path(root) / str(n) for n in range(100))
        check_order(list(islice(pools, _ORDER_POOLS)), labels, tokenizer, folders)
        with judge_stub(labels, latency_s=LATENCY_S) as url:
            results = _stub_alone(url)
            one = make_judge(url, tokenizer, next(folders), concurrency=1)
            many = make_judge(url, tokenizer, next(folders), concurrency=CONCURRENCY)
            sequential = [_call(one, islice(pools, 1))[0]]
            results |= _many(many, pools)
            sequential.append(_call(one, islice(pools, 1))[0])
    results["sequential_per_s"] = median(sequential)
    speedup = results["verdicts_per_s"] / results["sequential_per_s"]
    settings = {
        "verdicts": VERDICTS, "latency_ms": 1000 * LATENCY_S, "concurrency": CONCURRENCY,
        "questions_a_call": POOLS_A_CALL * _QUESTIONS, "prompt": PROMPT,
    }  # fmt: skip
    return {
        "name": "judge-client",
        "settings": settings,
        "results": results,
        "ratios": {"speedup": speedup},
    }


def make_judge(url: str, tokenizer: JudgeTokenizer, folder: Path, *, concurrency: int) -> Judge:
    """A judge of one pairwise criterion that asks the stub at `url`; its cache is new."""
    criterion = config_judge.PairwiseCriterion(
        form="pairwise", name="quality", server="stub", prompt=PROMPT
    )
    settings = config_judge.Judge(
        criteria=(criterion,), cache_dir=folder, concurrency=concurrency, both_orders=0.0
    )
    return Judge(
        (criterion,),
        servers={"stub": ServedModel(Endpoint("stub", url, MODEL), tokenizer, "stub")},
        cache=Cache(folder),
        settings=settings,
        prefix_text=lambda sample, number: "",
        suffix_text=lambda sample: "",
    )


def check_order(
    pools: Sequence[CandidatePool],
    labels: Sequence[int],
    tokenizer: JudgeTokenizer,
    folders: Iterator[Path],
) -> None:
    """Ask one after another, and all at once of a server that answers in a random order.

    Raises: ValueError if the verdicts differ, or are not all different.
    """
    found = []
    for concurrency, spread_s in ((1, 0.0), (CONCURRENCY, 0.2)):
        with judge_stub(labels, latency_s=0.0, spread_s=spread_s) as url:
            judge = make_judge(url, tokenizer, next(folders), concurrency=concurrency)
            found.append(judge.judge_pools(pools, seed=SEED)[1])
    if found[0] != found[1]:
        raise ValueError("verdicts depend on the order in which replies arrive")
    scores = {verdict.score for verdicts in found[0] for verdict in verdicts}
    if None in scores or len(scores) < 0.99 * sum(map(len, found[0])):
        raise ValueError("verdicts do not tell questions apart")


def _call(judge: Judge, pools: Iterable[CandidatePool]) -> tuple[float, float]:
    """Verdicts a second, and a second of this process's CPU time, of one call.

    Raises: ValueError if some are missing or were not paid for.
    """
    batch = list(pools)
    started, used = time.perf_counter(), time.process_time()
    _, _, counts = judge.judge_pools(batch, seed=SEED)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    if counts["missing"] or counts["paid"] != len(batch) * _QUESTIONS:
        raise ValueError(f"not every question was asked and answered: {counts}")
    return counts["paid"] / seconds, counts["paid"] / cpu


def _many(judge: Judge, pools: Iterator[CandidatePool]) -> dict[str, float]:
    """Verdicts a second, median of the calls, and what the memory's peak grows."""
    calls: list[tuple[float, float]] = []
    at_10k = done = 0.0
    while done < VERDICTS:
        calls.append(_call(judge, islice(pools, POOLS_A_CALL)))
        done += POOLS_A_CALL * _QUESTIONS
        if done >= WARM_UP and not at_10k:
            at_10k = _peak_mb()
    rates = [rate for rate, _ in calls]
    return {
        "verdicts_per_s": median(rates),
        "verdicts_per_s_slowest_call": min(rates),
        "verdicts_per_s_fastest_call": max(rates),
        "verdicts_per_cpu_s": median(rate for _, rate in calls),
        "peak_mb_at_10k": at_10k,
        "peak_mb_at_50k": _peak_mb(),
        "peak_growth_mb": _peak_mb() - at_10k,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _stub_alone(url: str) -> dict[str, float]:
    """Requests a second that the stub answers to a client without work of its own."""
    body = b'{"prompt": [' + b"12345, " * 1300 + b"0]}"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: stub\r\nContent-Length: {len(body)}\r\n\r\n"
    left = iter(range(_ALONE))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in left:
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length:")[2].split()[0])
            await reader.readexactly(length)
        writer.close()

    async def all_connections() -> None:
        await asyncio.gather(*(connection() for _ in range(CONCURRENCY)))

    started = time.perf_counter()
    asyncio.run(all_connections())
    return {"stub_alone_per_s": _ALONE / (time.perf_counter() - started)}
