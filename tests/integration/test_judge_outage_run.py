"""A judge that goes away during a run: it is waited for; the run then stops, and goes on later.

The trainer and the rollout server are real; the judge is a scripted server that the recipe connects
to, since a server that the trainer starts itself is started anew when it dies.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
from judge_helpers import likelihood_reply, scripted_server
from tiny_run import SIP

from megatron_sip.pool_store import num_committed, read_pools

STEPS = 4


class Judge:
    """Scores by length; answers 500 from the n-th question on until told otherwise."""

    def __init__(self) -> None:
        self.asked, self.fails_after = 0, 10**9
        self.failed = threading.Event()

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/health":
            return {}
        self.asked += 1
        if self.asked > self.fails_after:
            self.failed.set()
            return (500, {}, "out of order")
        return likelihood_reply(body, -1.0 / len(body["prompt"]))


def recipe_of(workplace: Any, pretrained: Any, name: str, url: str, **changes: Any) -> Any:
    base = copy.deepcopy(SIP)
    del base["rewriter"]
    base["servers"]["judge"] = {"kind": "connect", "url": url, "tokenizer": str(workplace.judge)}
    criterion = {"form": "likelihood", "name": "likelihood", "server": "judge"}
    return workplace.recipe(
        base,
        name,
        model__init={"kind": "megatron", "path": str(pretrained.run_dir)},
        run__steps=STEPS,
        curriculum__sources=["suffix", "rollout"],
        objective__pair_sources=["suffix", "rollout"],
        judge__criteria=[criterion],
        judge__timeout_s=1.0,
        judge__concurrency=4,
        **changes,
    )


@pytest.mark.full
def test_a_run_waits_for_its_judge_stops_with_a_checkpoint_and_goes_on(
    workplace: Any, pretrained: Any, launch: Any
) -> None:
    judge = Judge()
    with scripted_server(judge, model=str(workplace.judge)) as url:
        recipe = recipe_of(
            workplace, pretrained, "outage", url, judge__outage_patience_s=4.0,
        )  # fmt: skip
        judge.fails_after = 2 * 4 + 2 * 4 * 4 + 3  # evaluation of the start, two steps, and a bit
        run = launch(recipe).wait()
        assert run.process.returncode != 0
        (error,) = set(run.errors())
        assert "step 3: judge server judge" in error and "waited 4 s" in error
        run.assert_nothing_left(within_s=10)
        assert (run.run_dir / "checkpoints" / "step_00000002" / "train_state.json").is_file()
        assert num_committed(run.run_dir / "pools") == 2
        paid = judge.asked
        judge.fails_after = 10**9
        again = launch(recipe, "--resume").wait()
        assert again.process.returncode == 0, again.stderr()
    assert judge.asked - paid < 2 * 4 * 4 + 2 * 4 + 1  # two steps and the end's evaluation
    steps = [line["step"] for line in again.metrics()]
    assert steps == list(range(1, STEPS + 1))
    samples = [
        record.pool.sample.sample_id
        for step in range(STEPS)
        for record in read_pools(again.run_dir / "pools", step, dp_rank=0, dp_size=1)
    ]
    assert samples == list(range(4 * STEPS))


@pytest.mark.full
def test_a_spend_limit_stops_with_a_checkpoint_and_a_higher_one_goes_on(
    workplace: Any, pretrained: Any, launch: Any
) -> None:
    with scripted_server(Judge(), model=str(workplace.judge)) as url:
        recipe = recipe_of(
            workplace, pretrained, "limit", url, judge__limit={"questions": 20},
        )  # fmt: skip
        run = launch(recipe).wait()
        assert run.process.returncode != 0
        (error,) = set(run.errors())
        assert "judge.limit.questions: 32 are spent after step 2, the limit is 20" in error
        again = launch(recipe, "--resume", "--set", "judge.limit.questions=1000").wait()
        assert again.process.returncode == 0, again.stderr()
    assert [line["judge/spent_questions"] for line in again.metrics()] == [16, 32, 48, 64]
