"""The console: one plain line a step in a log, a panel on a terminal; logs catch what kills."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
import rich.console

from megatron_sip.console import Console, SilentConsole, StepConsole, setup_logging

METRICS = {
    "loss": 0.67123,
    "grad_norm": 1.25,
    "reward/chosen": -1.5,
    "pool/rollout_win_rate": 0.25,
    "rollout/logprob_mismatch": 2.5e-6,
    "rollout/tokens_per_s": 812.4,
    "time/rollout_s": 6.0,
    "time/train_s": 3.0,
}


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(40, title="quickstart", file=file, clock=clock), file


def test_plain_output_is_one_ascii_line_a_step() -> None:
    clock = Clock()
    console, file = plain(clock)
    with console:
        console.phase("rollout")
        clock.now = 9.75
        console.step(12, METRICS)
    assert file.getvalue() == (
        "step 12/40 loss 0.6712 grad norm 1.25 chosen -1.500 rollout wins 0.250 mismatch 2.5e-06 "
        "tokens/s 812 9.8 s/step left 04:33\n"
    )
    assert file.getvalue().isascii()


def test_measured_step_time_goes_before_the_clock_and_is_averaged() -> None:
    clock = Clock()
    console, file = plain(clock)
    clock.now = 300.0  # servers start
    console.step(1, {"time/step_s": 100.0})
    console.step(2, {"time/step_s": 300.0})
    assert file.getvalue().splitlines() == [
        "step 1/40 100.0 s/step left 1:05:00",
        "step 2/40 200.0 s/step left 2:06:40",
    ]


def test_note_with_brackets_is_printed_as_it_is() -> None:
    console, file = plain(Clock())
    console.note("[judge] answers :smile: again")
    assert file.getvalue() == "[judge] answers :smile: again\n"


def test_panel_shows_phase_progress_times_and_numbers() -> None:
    clock = Clock()
    console, _ = plain(clock)
    console.step(12, METRICS)
    console.phase("judge [a]")
    clock.now += 2.5
    screen = rich.console.Console(file=io.StringIO(), width=100)
    with screen.capture() as captured:
        screen.print(console.render())
    text = captured.get()
    for part in ("quickstart", "step 12/40", "judge [a] 2.5 s", "0.6712", "6.00 s", "rollout wins"):
        assert part in text
    bars = [line.count("━") for line in text.splitlines() if "━" in line][1:]
    assert bars == [24, 12]
    assert len(text.splitlines()) <= 24


def test_panel_before_the_first_step_has_no_pace() -> None:
    console, _ = plain(Clock())
    screen = rich.console.Console(file=io.StringIO(), width=100)
    with screen.capture() as captured:
        screen.print(console.render())
    assert "starting 0.0 s" in captured.get() and "left" not in captured.get()


def shown_on_terminal(console_use: Callable[[TextIO], None]) -> str:
    """What `console_use` writes to a pseudo-terminal, all of it."""
    leader, follower = pty.openpty()
    with open(follower, "w") as file:
        console_use(file)
    chunks = []
    with contextlib.suppress(OSError):  # Linux reports the closed far end as EIO
        while chunk := os.read(leader, 65536):
            chunks.append(chunk)
    os.close(leader)
    return b"".join(chunks).decode()


def test_terminal_gets_a_panel_and_notes_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def use(file: TextIO) -> None:
        with Console(3, title="live", file=file) as console:
            console.phase("train")
            console.note("[judge] is :smile: back")
            console.step(1, METRICS)
        console.close()  # twice does no harm

    shown = shown_on_terminal(use)
    assert "\x1b[" in shown and "step 1/3" in shown and "[judge] is :smile: back" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back


def test_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = shown_on_terminal(lambda file: Console(3, title="x", file=file).step(1, {"loss": 1.0}))
    assert shown.startswith("step 1/3 loss 1.0000") and "\x1b" not in shown


def test_both_consoles_keep_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentConsole() as silent:
        consoles: tuple[StepConsole, ...] = (silent, plain(Clock())[0])
        for console in consoles:
            console.phase("rollout")
            console.step(1, METRICS)
            console.note("hello")
            console.close()
    assert capsys.readouterr().out == ""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory; the root logger is put back."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    (tmp_path / "logs").mkdir()
    yield tmp_path
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    sys.excepthook = sys.__excepthook__


def test_each_rank_has_a_log_and_a_second_call_moves_it(run_dir: Path) -> None:
    setup_logging(run_dir, rank=0)
    logging.getLogger("megatron_sip.train").info("first")
    setup_logging(run_dir, rank=3)
    logging.getLogger("megatron_sip.train").info("second")
    main, other = (run_dir / "logs" / n for n in ("trainer.log", "trainer.rank3.log"))
    assert main.read_text().endswith("INFO megatron_sip.train: first\n")
    assert other.read_text().endswith("INFO megatron_sip.train: second\n")


DYING = """
import sys, threading
from pathlib import Path
from megatron_sip.console import setup_logging
setup_logging(Path(sys.argv[1]), rank=0)
def fail(): raise KeyError("in a thread")
thread = threading.Thread(target=fail, name="heartbeat"); thread.start(); thread.join()
thread = threading.Thread(target=sys.exit); thread.start(); thread.join()
raise RuntimeError("in the main thread")
"""


def test_uncaught_exceptions_are_logged_and_still_fail_the_process(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(run_dir)], capture_output=True, text=True, check=False
    )
    log = (run_dir / "logs" / "trainer.log").read_text()
    assert done.returncode == 1
    for text in (log, done.stderr):
        assert "KeyError: 'in a thread'" in text and "RuntimeError: in the main thread" in text
    assert "uncaught exception in thread heartbeat" in log and "SystemExit" not in log
