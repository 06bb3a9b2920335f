"""The offline pass against a scripted server: shards, kills, resuming, refusals, and the live
rewriter that pays for nothing afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from judge_helpers import scripted_server
from rewriting_helpers import NUM_DOCUMENTS, make_recipe, recipe, reply_to

from megatron_sip.data.document_mask import mask_of
from megatron_sip.data.manifest import load_manifest
from megatron_sip.data.positions import open_train
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.judge.cache import Cache
from megatron_sip.recipe import load_config
from megatron_sip.rewriting import corpus, shards
from megatron_sip.rewriting.acceptance import FAILED
from megatron_sip.rewriting.corpus import Pass, RewritesFailed, _written, rewrite_corpus
from megatron_sip.rewriting.rewriter import Rewriter, RewriterFailed
from megatron_sip.services import served_model
from megatron_sip.serving.client import Endpoint
from megatron_sip.serving.processes import ServerFailed

TOOL = Path(__file__).parents[2] / "tools" / "rewrite_corpus.py"
SAMPLES = 50
NOWHERE = "http://127.0.0.1:9"
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 8 samples, asked 4 at a time."""
    monkeypatch.setattr(shards, "SHARD_SAMPLES", 8)
    monkeypatch.setattr(corpus, "SHARD_SAMPLES", 8)
    monkeypatch.setattr(corpus, "SENT_AT_ONCE", 1)


class Rewriting:
    """The scripted rewriter; counts what it is asked, and can end whoever asks."""

    def __init__(self, answer=reply_to):
        self.asked, self.answer = 0, answer
        self.bodies = []
        self.at, self.act = -1, lambda: None

    def __call__(self, path, body):
        if "prompt" in body:
            self.asked += 1
            self.bodies.append(body)
        if self.asked == self.at:
            self.at = -1
            self.act()
        return self.answer(path, body)


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def rows_of(folder):
    return [row for p in sorted(folder.glob("*.parquet")) for row in pq.read_table(p).to_pylist()]


def tool(*arguments):
    """Run the tool in this process. Returns: exit status."""
    argv, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = argv
    return ended.value.code


def in_child(work):
    """Start `work` in a process of its own; its result is the exit status."""

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(work() or 0)

    process = fork.Process(target=run)
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pass that nothing disturbed: (files, rows)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SAMPLES", 8)
        patch.setattr(corpus, "SHARD_SAMPLES", 8)
        folder = tmp_path_factory.mktemp("whole")
        with scripted_server(reply_to) as url:
            outcomes = rewrite_corpus(recipe(folder, url), Pass(folder / "out", None, SAMPLES))
    return files_of(folder / "out"), rows_of(folder / "out"), outcomes


def test_a_pass_holds_the_samples_that_the_run_draws_in_its_order(whole, tmp_path):
    files, rows, outcomes = whole
    assert [row["sample_id"] for row in rows] == list(range(SAMPLES))
    assert [n for n in files if n.endswith(".parquet")] == [
        f"rewrites_{n:06d}.parquet" for n in range(7)
    ]
    config = recipe(tmp_path, NOWHERE)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    _, sampler = open_train(config)
    for i, row in enumerate(rows):
        sample = sampler[i]
        assert (row["document_id"], row["cut"]) == (sample.document_id, sample.cut)
        texts = tokenizer.continuation_text(sample.prefix_ids, sample.suffix_ids)
        assert row["suffix"] == texts[1]
        assert len(row["token_ids"]) <= 8 and row["outcome"] in ("kept", "refusal")
        assert tokenizer.continuation_text(sample.prefix_ids, row["token_ids"])[1] == row["rewrite"]
    assert 0 < outcomes["refusal"] < SAMPLES and outcomes.total() == SAMPLES
    manifest = json.loads(files["manifest.json"])
    assert manifest["samples"] == SAMPLES and manifest["outcomes"] == dict(outcomes)
    assert manifest["identity"]["rewriter.prompt"].startswith("rewrite_v2 ")


def live(config, url):
    """The rewriter as a run makes it."""
    return Rewriter(
        config.rewriter,
        server=served_model(config, "judge", Endpoint("judge", url, "judge")),
        cache=Cache(config.judge.cache_dir),
        tokenizer=Tokenizer.load(config.data.tokenizer),
        suffix_tokens=config.data.suffix_tokens,
    )


def test_a_pass_asks_what_the_run_would_ask_seeds_included(tmp_path):
    offline, online = Rewriting(), Rewriting()
    with scripted_server(offline) as url:
        rewrite_corpus(recipe(tmp_path, url, run__seed=3), Pass(tmp_path / "out", None, 10))
    with scripted_server(online) as url:
        config = recipe(tmp_path, url, run__seed=3, judge__cache_dir=str(tmp_path / "empty"))
        _, sampler = open_train(config)
        live(config, url).rewrite([sampler[i] for i in range(10)], seed=3)
    assert sorted(map(repr, offline.bodies)) == sorted(map(repr, online.bodies))


def test_the_run_then_pays_for_nothing(tmp_path):
    server = Rewriting()
    with scripted_server(server) as url:
        outcomes = rewrite_corpus(recipe(tmp_path, url), Pass(tmp_path / "out", None, SAMPLES))
    config = recipe(tmp_path, NOWHERE)
    _, sampler = open_train(config)
    found, stats = live(config, NOWHERE).rewrite(
        [sampler[i] for i in range(SAMPLES)], seed=config.run.seed
    )
    assert stats["cache_hits"] == SAMPLES and stats["rewrites"] == outcomes["kept"]
    assert stats["dropped"] == stats["dropped_refusal"] == outcomes["refusal"]
    for candidate, row in zip(found, rows_of(tmp_path / "out"), strict=True):
        assert (candidate is None) == (row["outcome"] != "kept")
        if candidate:
            np.testing.assert_array_equal(candidate.token_ids, row["token_ids"])
            assert (candidate.text, candidate.finish_reason) == (
                row["rewrite"], row["finish_reason"],
            )  # fmt: skip


@pytest.mark.parametrize("at", [2, 7, 9, 16, 17, 40, 50])
def test_a_killed_pass_goes_on_and_ends_with_the_same_bytes(whole, tmp_path, at):
    server = Rewriting()
    with scripted_server(server) as url:
        config, settings = recipe(tmp_path, url), Pass(tmp_path / "out", None, SAMPLES)
        child = in_child(lambda: bool(rewrite_corpus(config, settings)) - 1)
        server.at, server.act = at, lambda: os.kill(child.pid, signal.SIGKILL)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        there = {n: d for n, d in files_of(tmp_path / "out").items() if "rewrites" in n}
        assert there.items() <= whole[0].items() and len(there) <= at // 8
        before = server.asked
        rewrite_corpus(config, Pass(tmp_path / "out", None, SAMPLES, resume=True))
    assert files_of(tmp_path / "out") == whole[0]
    assert server.asked - before <= SAMPLES - (at - 1) + 4  # what was in flight is asked again


def test_a_kill_before_a_rename_leaves_no_half_shard(whole, tmp_path):
    def dies_at_third_rename():
        replaced, plain = [], Path.replace

        def replace(path, target):
            if len(replaced) == 2:  # after the manifest and one shard
                os.kill(os.getpid(), signal.SIGKILL)
            replaced.append(plain(path, target))

        Path.replace = replace
        rewrite_corpus(config, settings)

    with scripted_server(reply_to) as url:
        config, settings = recipe(tmp_path, url), Pass(tmp_path / "out", None, SAMPLES)
        child = in_child(dies_at_third_rename)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        names = [n for n in files_of(tmp_path / "out") if not n.startswith(".")]
        assert names == ["manifest.json", "rewrites_000000.parquet"]
        assert any(n.startswith(".rewrites_000001") for n in files_of(tmp_path / "out"))
        rewrite_corpus(config, Pass(tmp_path / "out", None, SAMPLES, resume=True))
    assert files_of(tmp_path / "out") == whole[0]


def test_ctrl_c_leaves_whole_shards_and_says_how_to_go_on(whole, tmp_path):
    server = Rewriting()
    with scripted_server(server) as url:
        arguments = ["--config", make_recipe(tmp_path, url), "--output", tmp_path / "out",
                     "--samples", SAMPLES]  # fmt: skip
        child = in_child(lambda: tool(*arguments))
        server.at, server.act = 20, lambda: os.kill(child.pid, signal.SIGINT)
        child.join(30)
        assert child.exitcode == 130
        there = {n: d for n, d in files_of(tmp_path / "out").items() if "rewrites" in n}
        assert there.items() <= whole[0].items() and len(there) == 2
        assert tool(*arguments) == 1  # without --resume
        assert tool(*arguments, "--resume") == 0
    assert files_of(tmp_path / "out") == whole[0]


def test_a_finished_pass_needs_no_server_and_a_longer_one_asks_for_the_rest(tmp_path):
    server = Rewriting()
    with scripted_server(server) as url:
        config = recipe(tmp_path, url)
        rewrite_corpus(config, Pass(tmp_path / "out", None, 20))
        rewrite_corpus(config, Pass(tmp_path / "out", None, 30, resume=True))
        assert server.asked == 30
    offline = recipe(tmp_path, NOWHERE)
    for number in (30, 25):
        outcomes = rewrite_corpus(offline, Pass(tmp_path / "out", None, number, resume=True))
        assert outcomes.total() == number
    assert len(rows_of(tmp_path / "out")) == 30


def test_the_default_is_all_that_the_run_draws_and_a_pass_every_document(tmp_path):
    with scripted_server(reply_to) as url:
        config = recipe(tmp_path, url, run__steps=2, data__global_batch_size=8)
        assert rewrite_corpus(config, Pass(tmp_path / "run")).total() == 16
        assert rewrite_corpus(config, Pass(tmp_path / "one", 1)).total() == NUM_DOCUMENTS
        documents = [row["document_id"] for row in rows_of(tmp_path / "one")]
        assert sorted(documents) == list(range(NUM_DOCUMENTS))
    with pytest.raises(ValueError, match="--passes and --samples exclude each other"):
        rewrite_corpus(config, Pass(tmp_path / "both", 1, 1))
    with pytest.raises(ValueError, match=r"0 samples: .* at least 1"):
        rewrite_corpus(config, Pass(tmp_path / "none", None, 0))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"run__seed": 2}, "run.seed was 1, is 2"),
        ({"rewriter__prompt": "rewrite_v1"}, "rewriter.prompt was rewrite_v2 "),
        ({"rewriter__temperature": 0.5}, "rewriter.temperature was 0.7, is 0.5"),
        ({"rewriter__max_tokens": 16}, "rewriter.max_tokens was 32, is 16"),
        ({"data__suffix_tokens": 6}, "data.suffix_tokens was 8, is 6"),
        ({"servers__judge": {"model": "other"}}, "rewriter.server, model was judge judge, is"),
    ],
)
def test_another_recipe_is_refused_by_the_name_of_what_differs(tmp_path, changes, key):
    with scripted_server(reply_to) as url:
        rewrite_corpus(recipe(tmp_path, url), Pass(tmp_path / "out", None, 8))
    before = files_of(tmp_path / "out")
    if "servers__judge" in changes:
        tokenizer = str(tmp_path / "judge")
        changes["servers__judge"] |= {"kind": "connect", "url": NOWHERE, "tokenizer": tokenizer}
    config = recipe(tmp_path, NOWHERE, **changes)
    with pytest.raises(ValueError, match=r"--resume: ") as refused:
        rewrite_corpus(config, Pass(tmp_path / "out", None, 8, resume=True))
    assert key in str(refused.value)
    assert files_of(tmp_path / "out") == before


def test_other_data_and_other_files_are_refused(tmp_path, capsys):
    with scripted_server(reply_to) as url:
        path = make_recipe(tmp_path, url)
        arguments = ["--config", path, "--samples", 8, "--output"]
        assert tool(*arguments, tmp_path / "out") == 0
        assert "8 samples" in capsys.readouterr().out
        for part in tmp_path.glob("data.*"):
            (tmp_path / part.name.replace("data", "other")).write_bytes(part.read_bytes())
        arguments += [tmp_path / "out", "--resume", "--data"]
        assert tool(*arguments, tmp_path / "other") == 0  # the same documents
        assert tool(*arguments, tmp_path / "gone") == 1
        assert f"{tmp_path}/gone" in capsys.readouterr().err
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "letter.txt").touch()
        with pytest.raises(ValueError, match="holds other files"):
            rewrite_corpus(load_config(path), Pass(tmp_path / "full", None, 8))
    (tmp_path / "out" / "rewrites_000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"rewrites_000000\.parquet cannot be read"):
        rewrite_corpus(load_config(path), Pass(tmp_path / "out", None, 8, resume=True))


def test_too_many_failures_end_the_pass_and_few_are_asked_again(tmp_path):
    def mostly_fails(path, body):  # by the prompt, so that it heals by itself for nobody
        fails = "prompt" in body and sum(body["prompt"]) % 3
        return (400, {}, "no") if fails else reply_to(path, body)

    server = Rewriting(mostly_fails)
    with scripted_server(server) as url:
        config = recipe(tmp_path, url)
        with pytest.raises(RewritesFailed, match=r"of 20 samples have no reply, --max-failed is 5"):
            rewrite_corpus(config, Pass(tmp_path / "out", None, SAMPLES))
        server.answer = lambda path, body: (400, {}, "no luck") if "prompt" in body else {}
        with pytest.raises(RewritesFailed, match=r"of 20 samples .* example: .*no luck"):
            rewrite_corpus(config, Pass(tmp_path / "none", None, SAMPLES))
        server.answer = mostly_fails
        with pytest.raises(RewritesFailed, match=r"of 8 samples have no reply"):
            rewrite_corpus(config, Pass(tmp_path / "short", None, 8))
        settings = Pass(tmp_path / "few", None, SAMPLES, max_failed=1.0)
        assert rewrite_corpus(config, settings)["failed"] > 0
        server.answer = reply_to
        again = Pass(tmp_path / "few", None, SAMPLES, resume=True)
        assert rewrite_corpus(config, again)["failed"] == 0


def test_unsafe_documents_are_those_of_the_mask(tmp_path):
    config = recipe(tmp_path, NOWHERE)
    corpus_, sampler = open_train(config)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    manifest = load_manifest(tmp_path / "data.manifest.json")
    members = np.arange(NUM_DOCUMENTS) % 2 == 0
    mask = mask_of(members, min_tokens=24, idx_xxh3_128=manifest.idx_xxh3_128)
    mask.save(tmp_path / "data.unsafe")
    texts = [tokenizer.decode(sampler[i].suffix_ids) for i in range(NUM_DOCUMENTS)]
    prompts = {}

    def copies(path, body):
        if "prompt" not in body:
            return {}
        shown = served.tokenizer._trusted.decode(body["prompt"])
        text = max((t for t in texts if t in shown), key=len)
        prompts[text] = shown
        return {"choices": [{"text": text}]}

    served = served_model(config, "judge", Endpoint("judge", NOWHERE, "judge"))
    assert served.tokenizer
    with scripted_server(copies) as url:
        outcomes = rewrite_corpus(
            recipe(tmp_path, url), Pass(tmp_path / "out", 1, unsafe_mask="unsafe")
        )
    for row in rows_of(tmp_path / "out"):
        unsafe = row["document_id"] % 2 == 0
        assert row["outcome"] == ("unchanged_unsafe" if unsafe else "copied")
    assert outcomes == {"unchanged_unsafe": 12, "copied": 12}
    with pytest.raises(ValueError, match=r"data\.gone"):
        rewrite_corpus(config, Pass(tmp_path / "other", 1, unsafe_mask="gone"))
    assert corpus_.num_documents == NUM_DOCUMENTS


class Scripted:
    """A rewriter and the supervisor of its server in one: what each call gives, in order."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def write(self, samples: object, *, seed: int, unsafe: object) -> object:
        return self._next()

    def settle(self) -> object:
        return self._next()

    def _next(self) -> object:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


KEPT, LOST = [SimpleNamespace(outcome="kept")], [SimpleNamespace(outcome=FAILED)]


def test_what_a_dead_server_left_is_asked_again_once_it_is_back() -> None:
    both: Any = Scripted(RewriterFailed("gone"), True, LOST, True, KEPT)
    assert _written(both, both, [], seed=1, unsafe=[]) is KEPT
    both = Scripted(LOST, False)
    assert _written(both, both, [], seed=1, unsafe=[]) is LOST  # the server lives: --max-failed
    both = Scripted(RewriterFailed("gone"), False)
    with pytest.raises(RewriterFailed):
        _written(both, both, [], seed=1, unsafe=[])
    both = Scripted(RewriterFailed("gone"), ServerFailed("judge", reason="spent"))
    with pytest.raises(ServerFailed, match="spent"):
        _written(both, both, [], seed=1, unsafe=[])
