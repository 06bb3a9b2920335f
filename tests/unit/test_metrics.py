"""Metrics: valid JSON always, known names only, exact means over ranks, honest phase times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sip.metrics import METRICS, MetricLogger, PhaseTimer, metric, reduce_means


def lines(run_dir: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_line_is_readable_at_once_with_sorted_keys_and_exact_floats(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path)
    logger.log(1, {"loss": 0.1, "grad_norm": 1 / 3, "reward/likelihood": float(np.float32(0.5))})
    text = (tmp_path / "metrics.jsonl").read_text()  # before close
    assert text == '{"grad_norm": 0.3333333333333333, "loss": 0.1, "reward/likelihood": 0.5, "step": 1}\n'  # noqa: E501  # fmt: skip
    logger.close()


def test_non_finite_number_is_null_and_still_named(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path)
    logger.log(3, {"loss": float("nan"), "grad_norm": float("inf"), "lr": -float("inf")})
    logger.log(4, {"loss": 1.0})
    first, second = lines(tmp_path)
    assert first["loss"] is None and first["grad_norm"] is None
    assert first["non_finite"] == {"loss": "nan", "grad_norm": "inf", "lr": "-inf"}
    assert second == {"step": 4, "loss": 1.0}


def test_unknown_metric_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path)
    with pytest.raises(ValueError, match=r'"grad_nrm" is not in the table.*did you mean "grad_n'):
        logger.log(1, {"loss": 1.0, "grad_nrm": 2.0})
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["reward/likelihood", "reward/is-safe", "time/rollout_s", *METRICS]
)
def test_names_of_the_table_and_of_the_patterns_are_known(name: str) -> None:
    found = metric(name)
    assert found.unit and found.meaning


@pytest.mark.parametrize("name", ["reward/", "reward/a/b", "time/rollout", "time/_s", "", "LOSS"])
def test_names_near_a_pattern_are_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="not in the table"):
        metric(name)


def test_logger_appends_and_removes_half_a_line(tmp_path: Path) -> None:
    first = MetricLogger(tmp_path)
    first.log(1, {"loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.')
    second = MetricLogger(tmp_path)
    second.log(2, {"loss": 2.0})
    second.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_phase_times_add_up_and_are_taken_once() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for seconds in (2.0, 3.0):
        with timer("rollout"):
            clock.now += seconds
    with timer("judge"):
        clock.now += 1.0
    assert timer.take() == {"time/rollout_s": 5.0, "time/judge_s": 1.0}
    assert timer.take() == {}


def test_nested_phase_counts_in_both_and_current_is_the_innermost() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    assert timer.current == ""
    with timer("step"):
        with timer("train"):
            clock.now += 1.0
            assert timer.current == "train"
        clock.now += 1.0
        assert timer.current == "step"
    assert timer.current == ""
    assert timer.take() == {"time/train_s": 1.0, "time/step_s": 2.0}


def test_phase_that_fails_is_closed_and_counted() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError), timer("judge"):
        clock.now += 4.0
        raise RuntimeError
    assert timer.current == "" and timer.take() == {"time/judge_s": 4.0}


def test_mean_over_ranks_is_the_global_mean_not_a_mean_of_means() -> None:
    ranks = [{"reward/chosen": (9.0, 3.0)}, {"reward/chosen": (1.0, 1.0), "lr": (2.0, 1.0)}]
    assert reduce_means(ranks) == {"lr": 2.0, "reward/chosen": 2.5}


def test_metric_that_nobody_counted_is_absent() -> None:
    ranks = [{"objective/dpo": (0.0, 0.0)}, {"objective/dpo": (0.0, 0.0)}, {}]
    assert reduce_means(ranks) == {} == reduce_means([])


def test_the_documented_table_of_metrics_is_the_one_in_code():
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tools" / "metrics_table.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (root / "docs" / "metrics.md").read_text() == printed, (
        "run python tools/metrics_table.py > docs/metrics.md"
    )
