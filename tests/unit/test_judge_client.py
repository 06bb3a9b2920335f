"""What many questions at once may do to the judge's client: nothing. Small `judge-client`."""

from __future__ import annotations

import asyncio
import random
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_helpers import labels_reply, make_model_folder, make_pool, scripted_server

from megatron_sip.benchmark import judge_client
from megatron_sip.benchmark.judge_client import check_order, make_judge
from megatron_sip.benchmark.judge_stub import MODEL
from megatron_sip.judge import judge as judge_module
from megatron_sip.judge import text_model
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.servers import ServerPool
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.types import CandidatePool

CANDIDATES, POOLS = 6, 3
QUESTIONS = POOLS * CANDIDATES * (CANDIDATES - 1) // 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> JudgeTokenizer:
    return JudgeTokenizer(make_model_folder(tmp_path_factory.mktemp("model")))


def pools() -> list[CandidatePool]:
    return [
        make_pool([f"word {p} of {c}" for c in range(CANDIDATES)], prefix=f"T{p}", sample_id=p)
        for p in range(POOLS)
    ]


class Server:
    """Its verdict depends on the prompt; its replies come in a random order."""

    def __init__(self, tokenizer: JudgeTokenizer, *, num_refused: int = 0) -> None:
        self.labels = [tokenizer.label_id(label) for label in "12"]
        self.left_to_refuse, self.in_flight, self.most = num_refused, 0, 0
        self.watched: list[ServerPool] = []
        self.most_locks = 0

    async def __call__(self, path: str, body: dict[str, Any]) -> Any:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        self.most_locks = max([self.most_locks, *(len(pool._locks) for pool in self.watched)])
        refuse, self.left_to_refuse = self.left_to_refuse > 0, self.left_to_refuse - 1
        await asyncio.sleep(random.uniform(0.005, 0.05))
        self.in_flight -= 1
        if refuse:
            return 503, {}, "later"
        share = zlib.crc32(repr(body["prompt"]).encode()) / 2**33
        return labels_reply({self.labels[0]: -share, self.labels[1]: -1.0})


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[ServerPool]:
    """Every ServerPool that a judge makes."""
    made: list[ServerPool] = []

    class Watched(ServerPool):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr(judge_module, "ServerPool", Watched)
    return made


def judged(
    server: Server, tokenizer: JudgeTokenizer, folder: Path, *, concurrency: int
) -> tuple[list[Any], dict[str, float]]:
    with scripted_server(server, model=MODEL) as url:
        judge = make_judge(url, tokenizer, folder, concurrency=concurrency)
        _, verdicts, counts = judge.judge_pools(pools(), seed=1)
    return verdicts, counts


def test_verdicts_do_not_depend_on_the_order_of_replies(tokenizer, tmp_path) -> None:
    one = judged(Server(tokenizer), tokenizer, tmp_path / "1", concurrency=1)[0]
    many = judged(Server(tokenizer), tokenizer, tmp_path / "2", concurrency=64)[0]
    assert one == many
    assert len({v.score for known in one for v in known}) == QUESTIONS


def test_no_more_questions_are_in_flight_than_allowed(tokenizer, tmp_path) -> None:
    server = Server(tokenizer)
    judged(server, tokenizer, tmp_path, concurrency=7)
    assert server.most == 7


def test_locks_are_those_of_questions_in_flight(tokenizer, tmp_path, watched) -> None:
    server = Server(tokenizer)
    server.watched = watched
    judged(server, tokenizer, tmp_path, concurrency=5)
    assert 0 < server.most_locks <= 5
    assert [len(pool._locks) for pool in watched] == [0]


def test_each_retry_is_counted_and_paid_once(tokenizer, tmp_path) -> None:
    server = Server(tokenizer, num_refused=4)
    _, counts = judged(server, tokenizer, tmp_path, concurrency=16)
    assert (counts["retries"], counts["paid"], counts["missing"]) == (4, QUESTIONS, 0)


def test_no_thread_or_task_is_left_behind(tokenizer, tmp_path) -> None:
    before = threading.active_count()
    judged(Server(tokenizer), tokenizer, tmp_path, concurrency=16)
    assert threading.active_count() == before


def test_remembered_token_ids_are_few_and_the_same(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(text_model, "PIECES", 8)
    fresh = JudgeTokenizer(make_model_folder(tmp_path))
    messages = (("user", "<|end|> is $a and $b"),)
    fields = [{"a": f"word {n}", "b": "<|end|>"} for n in range(50)]
    first = [fresh.render(messages, fields=field) for field in fields]
    assert first == [fresh.render(messages, fields=field) for field in reversed(fields)][::-1]
    assert fresh._ids.cache_info().currsize == 8
    assert len({tuple(ids) for ids in first}) == len(fields)
    special = fresh._trusted.token_to_id("<|end|>")
    assert special is not None
    assert all(ids.count(special) == 1 for ids in first)  # ours, not the one in the field


def test_the_benchmark_notices_verdicts_in_the_wrong_order(
    tokenizer, tmp_path, monkeypatch
) -> None:
    labels = [tokenizer.label_id(label) for label in "12"]

    def folders() -> Iterator[Path]:
        yield from (tmp_path / str(n) for n in range(9))

    unused = folders()
    check_order(pools(), labels, tokenizer, unused)
    answers = Judge._answers

    async def as_they_come(self: Judge, *args: Any) -> list[Any]:
        return random.sample(found := await answers(self, *args), len(found))

    monkeypatch.setattr(Judge, "_answers", as_they_come)
    with pytest.raises(ValueError, match="the order in which replies arrive"):
        check_order(pools(), labels, tokenizer, unused)
    assert judge_client.CONCURRENCY > QUESTIONS
