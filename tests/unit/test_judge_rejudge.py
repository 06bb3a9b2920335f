"""Recorded pools judged again: agreement with oneself and one's inverse, cache, failures, files."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_helpers import write_dataset
from judge_helpers import scripted_server
from rejudge_helpers import FIT, QUALITY, GoodnessJudge, judged_run, model_folder, recipe

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import RunFailed
from megatron_sip.judge import rejudge as rejudge_module
from megatron_sip.judge.recorded_pools import choose, find_ledgers, parse_steps
from megatron_sip.judge.rejudge import Task, rejudge
from megatron_sip.judge.rejudge_view import by_step, check_output, publisher
from megatron_sip.judge.servers import JudgeFailed
from megatron_sip.recipe import load_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def again(
    folder: Path, path: Path, *overrides: str, name: str = "out", watch: Any = None, **task: Any
) -> dict[str, Any]:
    """Judge folder/run again. Returns: what the .json holds."""
    config = load_config(path, overrides)
    task = {"pools": [folder / "run"]} | task
    chosen = Task(**task)
    output = folder / f"{name}.parquet"
    rejudge(
        config,
        chosen,
        output=output,
        log_dir=folder / "logs",
        say=print,
        watch=watch or (lambda done, total, questions: None),
        publish=publisher(config, chosen),
    )
    return json.loads(output.with_suffix(".json").read_text())


def means(found: dict[str, Any]) -> list[float]:
    return [row["mean"] for row in found["agreement"].values()]


def test_the_same_judge_agrees_with_itself_and_pays_for_nothing(tmp_path: Path, model: Path):
    server = GoodnessJudge(model)
    with scripted_server(server) as url:
        path = recipe(tmp_path, url, model, judge={"criteria": [QUALITY, FIT]})
        judged_run(tmp_path, path)
        asked = server.num_asked
        found = again(tmp_path, path)
    assert server.num_asked == asked
    assert means(found) == [1.0] * 5
    assert found["agreement"]["same_best"] == {
        "mean": 1.0, "low": 1.0, "high": 1.0, "chance": 0.25, "pools": 8,
    }  # fmt: skip
    assert found["ledger"]["num_pools"] == 8 and found["ledger"]["steps"] == [0, 3]
    assert found["ledger"]["num_candidates_compared"] == 32
    assert found["costs"]["paid"] == 0 and found["costs"]["verdicts"] == 8 * (6 + 4)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(r["step"], r["position"], r["candidate"]) for r in rows[:9]] == [
        *((0, 0, c) for c in range(4)), *((0, 1, c) for c in range(4)), (1, 0, 0),
    ]  # fmt: skip
    for row in rows:
        assert row["run"] == "run" and row["reward_new"] == row["reward_ledger"]
        scores = {item["name"]: item["score"] for item in row["by_criterion"]}
        assert sum(scores.values()) == pytest.approx(row["reward_new"], rel=1e-6)
        assert (row["verdicts"], row["missing"]) == (4, 0)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_an_inverted_judge_agrees_with_nothing(tmp_path: Path, model: Path):
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
    with scripted_server(GoodnessJudge(model, inverse=True), model="other") as url:
        where = (f"servers.judge.url={url}", "servers.judge.model=other")
        found = again(tmp_path, path, *where)
    assert means(found) == pytest.approx([0.0, 0.0, -1.0, -1.0, 0.0])
    assert found["servers"] == {"judge": "other"}
    assert found["costs"]["paid"] == found["costs"]["verdicts"] == 8 * 6


@pytest.mark.parametrize(
    "schedule",
    ['{ name = "pivot" }', '{ name = "bracket" }', '{ name = "random_pairs", opponents = 2 }'],
)
def test_a_cheaper_schedule_of_a_clear_judge_finds_the_same_best(
    tmp_path: Path, model: Path, schedule: str
):
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        found = again(tmp_path, path, f"judge.schedule={schedule}")
    assert found["costs"]["verdicts"] < 8 * 6
    assert found["agreement"]["same_best"]["mean"] > 0.8


def test_a_second_run_asks_nothing_and_writes_the_same(tmp_path: Path, model: Path):
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        new = "judge.criteria=[{form='likelihood', name='fit', server='judge'}]"
        server = GoodnessJudge(model)
        with scripted_server(server) as url:
            where = f"servers.judge.url={url}"
            first = again(tmp_path, path, where, new, name="first")
            asked = server.num_asked
            second = again(tmp_path, path, where, new, name="second")
    assert asked == 8 * 4 == server.num_asked
    assert (first["costs"]["paid"], second["costs"]["paid"]) == (32, 0)
    assert first["agreement"] == second["agreement"]
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("first", "second")]
    assert tables[0].equals(tables[1])


def left_over(folder: Path) -> set[str]:
    """What stands beside what was there before."""
    return {p.name for p in folder.iterdir()} - {"run", "cache", "recipe.toml", "logs"}


def test_a_failed_judge_leaves_no_file_and_what_it_said_is_not_paid_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rejudge_module, "BATCH_POOLS", 2)
    new = "judge.criteria=[{form='likelihood', name='fit', server='judge'}]"
    server = GoodnessJudge(model)
    with scripted_server(server) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        server.num_asked = 0
        server.before = lambda n: (400, {}, "out of order") if n > 20 else None
        with pytest.raises(JudgeFailed, match="out of order"):
            again(tmp_path, path, new)
        assert left_over(tmp_path) == set()
        server.before = lambda n: None
        found = again(tmp_path, path, new)
    assert found["costs"]["paid"] == 8 * 4 - 20
    assert left_over(tmp_path) == {"out.parquet", "out.json", "out.png"}


def test_a_missing_verdict_is_no_reward_and_not_compared(tmp_path: Path, model: Path):
    new = "judge.criteria=[{form='likelihood', name='fit', server='judge'}]"
    server = GoodnessJudge(model)
    with scripted_server(server) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        server.num_asked = 0
        server.before = lambda n: (400, {}, "no") if n % 5 == 0 else None
        found = again(tmp_path, path, new, "judge.max_missing_rate=1.0")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    missing = [row for row in rows if row["missing"]]
    assert len(missing) == 6 == found["costs"]["missing"]  # of 32 questions
    assert all(row["reward_new"] is None and not row["passes_new"] for row in missing)
    assert all(row["by_criterion"] == [{"name": "fit", "score": None}] for row in missing)
    assert all((row["reward_new"] is None) == (row in missing) for row in rows)
    assert all(row["reward_ledger"] is not None for row in rows)
    assert found["ledger"]["num_candidates_compared"] == 26
    assert found["agreement"]["kendall"]["mean"] == 1.0  # among those that are left


def test_no_more_is_spent_than_the_limit_and_the_rest_is_paid_later(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rejudge_module, "BATCH_POOLS", 2)
    new = "judge.criteria=[{form='likelihood', name='fit', server='judge'}]"
    server = GoodnessJudge(model)
    with scripted_server(server) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        server.num_asked = 0
        with pytest.raises(RunFailed, match=r"judge\.limit\.questions: 16 are spent after 4 pools"):
            again(tmp_path, path, new, "judge.limit.questions=10")
        assert server.num_asked == 16 and left_over(tmp_path) == set()
        found = again(tmp_path, path, new, "judge.limit.questions=17")  # the last batch may pass it
    assert found["costs"]["paid"] == 16


def test_an_interruption_leaves_no_file(tmp_path: Path, model: Path):
    def stop(done: int, total: int, questions: int) -> None:
        if done:
            raise KeyboardInterrupt

    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        with pytest.raises(KeyboardInterrupt):
            again(tmp_path, path, watch=stop)
    assert left_over(tmp_path) == set()


def test_a_picture_that_cannot_be_drawn_leaves_no_file(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match="needs matplotlib"):
            again(tmp_path, path)
    assert left_over(tmp_path) == set()


def test_steps_and_samples_choose_pools(tmp_path: Path, model: Path):
    seen: list[tuple[int, int]] = []
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        shutil.copytree(tmp_path / "run", tmp_path / "twin")
        found = again(
            tmp_path,
            path,
            steps=slice(1, 3),
            pools=[tmp_path / "run", tmp_path / "twin" / "pools"],
            watch=lambda done, total, questions: seen.append((done, total)),
        )
        assert found["ledger"]["num_pools"] == 8 and found["ledger"]["steps"] == [1, 2]
        rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert {(r["run"], r["step"]) for r in rows} == {
            (run, step) for run in ("run", "twin") for step in (1, 2)
        }
        drawn = []
        for seed in (5, 5, 6):
            again(tmp_path, path, f"run.seed={seed}", sample=3, name="drawn")
            table = pq.read_table(tmp_path / "drawn.parquet")
            drawn.append(sorted(set(table["sample_id"].to_pylist())))
        assert again(tmp_path, path, sample=99, name="all")["ledger"]["num_pools"] == 8
        assert _every_pool_can_be_drawn(tmp_path / "run")
    assert seen == [(0, 8), (8, 8)]
    assert len(drawn[0]) == 3 and drawn[0] == drawn[1] != drawn[2]


def _every_pool_can_be_drawn(run: Path) -> bool:
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(60):
        parts = choose(find_ledgers([run]), steps=slice(0, None), sample=3, seed=seed)
        drawn = [(part.step, int(position)) for part in parts for position in part.positions]
        assert len(set(drawn)) == 3 and drawn == sorted(drawn)
        counts.update(drawn)
    return len(counts) == 8 and min(counts.values()) > 8  # 22 each on average


def test_what_is_wrong_is_refused_before_a_server_is_asked(tmp_path: Path, model: Path):
    server = GoodnessJudge(model)
    with scripted_server(server) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
    asked = server.num_asked
    run = tmp_path / "run"
    other = tmp_path / "other"
    other.mkdir()
    text = (model / "tokenizer.json").read_text().replace('"Once"', '"once"')
    tree = json.loads(text)
    vocabulary = tree["model"]["vocab"]
    letters = [t for t in vocabulary if len(t) == 1]
    for a, b in zip(letters[::2], letters[1::2], strict=False):
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    shutil.copy(model / "tokenizer_config.json", other)
    fit = "judge.criteria=[{form='likelihood', name='fit', server='judge'}]"
    wrong = f"data.tokenizer={other / 'tokenizer.json'}"
    policy = "judge.criteria=[{form='likelihood', name='fit', server='policy'}]"
    prompt = "judge.criteria=[{form='pairwise', name='q', server='judge', prompt='nothing_v1'}]"
    cases: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("holds no committed step", (), {"pools": [tmp_path]}),
        ("named twice", (), {"pools": [run, run / "pools"]}),
        ("--steps 7:: no such step", (), {"steps": slice(7, None)}),
        ("--sample 0", (), {"sample": 0}),
        ("not of data.tokenizer.*nothing beside it", (fit, wrong), {}),
        ("asks server policy, the policy of a run", (policy,), {}),
        ("no prompt 'nothing_v1'", (prompt,), {}),
        ("cannot be read", (), {"calibration": tmp_path / "none.jsonl"}),
    ]
    for said, overrides, task in cases:
        with pytest.raises(ValueError, match=said):
            again(tmp_path, path, *overrides, **task)
    assert server.num_asked == asked and left_over(tmp_path) == {"other"}


def test_the_tokenizer_of_the_run_is_named(tmp_path: Path, model: Path):
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
    (tmp_path / "run" / "config.toml").write_text('[data]\ntokenizer = "old.model"\n')
    state = tmp_path / "run" / "checkpoints" / "step_00000004"
    state.mkdir(parents=True)
    (state / "train_state.json").write_text(json.dumps({"digests": {"tokenizer": "ab" * 32}}))
    pools = tmp_path / "run" / "pools"
    ledger = find_ledgers([pools])[0]
    part = choose([ledger], steps=slice(0, 1), sample=None, seed=1)[0]
    record = rejudge_module.read_part(part)[0]

    class Other:
        digest = "cd" * 32

        def continuation_text(self, prefix: Any, ids: Any) -> tuple[str, str]:
            raise ValueError("ids out of range")

    with pytest.raises(ValueError, match=r"old\.model, digest abababababab"):
        rejudge_module.check_tokenizer(Other(), Path("t"), ledger=ledger, record=record)  # type: ignore[arg-type]


def test_novelty_is_counted_by_data_train(tmp_path: Path, model: Path):
    tokenizer = Tokenizer.load(model / "tokenizer.json")
    document = [*tokenizer.encode(" good" * 40), tokenizer.eod]
    write_dataset(
        tmp_path / "train", [document] * 3, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod,
        tokenizer_digest=tokenizer.digest,
    )  # fmt: skip
    with scripted_server(GoodnessJudge(model)) as url:
        path = recipe(tmp_path, url, model)
        judged_run(tmp_path, path)
        new = "judge.criteria=[{form='novelty', name='new'}, {form='likelihood', name='fit', server='judge', weight=0.0}]"  # noqa: E501
        found = again(tmp_path, path, new)
    assert found["agreement"]["same_best"]["mean"] < 1  # "good" is all that is known
    assert [c["name"] for c in found["judge"]["criteria"]] == ["new", "fit"]


def test_labelled_pairs_show_a_judge_that_prefers_what_stands_first(tmp_path: Path, model: Path):
    labels = ["a", "b"] * 4
    pairs = [
        {"prefix": f"P{i}", "a": " good" * (better == "a") + f" x{i}",
         "b": " good" * (better == "b") + f" y{i}", "better": better}
        for i, better in enumerate(labels)
    ]  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for first_helps, firsts, seconds, same in ((0.0, 1, 1, 1), (3.0, 1, 0, 0)):
        with scripted_server(GoodnessJudge(model, first_helps=first_helps)) as url:
            path = recipe(tmp_path, url, model, judge={"criteria": [QUALITY, FIT]})
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            found = again(tmp_path, path, pools=[], calibration=file)
        assert "agreement" not in found
        quality, fit, total = found["calibration"]["accuracy"].values()
        assert (quality["better_first"], quality["better_second"]) == (firsts, seconds)
        assert quality["consistent"] == same and quality["pairs"] == 8
        assert quality["accuracy"] == (firsts + seconds) / 2
        assert fit["accuracy"] == 1.0 and fit["better_first"] is None
        assert total["accuracy"] == 1.0
        assert found["calibration"]["costs"]["verdicts"] == 8 * (2 + 2)
    assert left_over(tmp_path) == {"pairs.jsonl", "out.json"}


def test_names_of_output_and_steps_are_checked(tmp_path: Path, model: Path):
    check_output(tmp_path / "new" / "a.parquet")
    (tmp_path / "a.json").mkdir()
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools" / "step_00000000.done").touch()
    for name, said in (
        ("a.csv", "must end in"), ("a.parquet", "is a folder"), ("pools/a.parquet", "recorded"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            check_output(tmp_path / name)
    assert (parse_steps(":"), parse_steps("3:"), parse_steps(":4")) == (
        slice(None, None), slice(3, None), slice(None, 4),
    )  # fmt: skip
    for text in ("3", "a:b", "-1:2", "1:2:3", "4:4", "5:2", ":0"):
        with pytest.raises(ValueError, match="--steps"):
            parse_steps(text)


def test_many_steps_are_joined_on_the_curve() -> None:
    results = rejudge_module.Results()
    for step in np.repeat(np.arange(0, 500, 5), 3):
        values = dict.fromkeys(("same_best", "same_worst", "spearman", "kendall"), float(step))
        results.pools.append(
            rejudge_module.PoolAgreement(4, values | {"pair_order": float("nan")}, {})
        )
        results.steps.append(int(step))
    rows = by_step(results)
    assert len(rows) == 40 and sum(row[2] for row in rows) == 300
    assert (rows[0][0], rows[-1][1]) == (0, 495)
    assert all(row[0] <= row[3]["kendall"] <= row[1] for row in rows)  # type: ignore[operator]
    assert all(row[3]["pair_order"] is None for row in rows)
