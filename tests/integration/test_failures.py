"""What goes wrong while a run goes on: real command line, Megatron-Core and vLLM.

Each run ends with status 1 and one error that names the culprit; no process is left, and the log
of rank 0 holds the same words.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_run import NTP, SIP, TrainerRun, Workplace

LIMIT_S = 240


class BadJudge(BaseHTTPRequestHandler):
    """Serves a model named "m", and fails on every question."""

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        self.answer(400, b"out of order")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def bad_judge() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BadJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def failure(run: TrainerRun) -> str:
    """The one error of a run on one rank that had begun; nothing may be left of it."""
    run.wait(LIMIT_S)
    assert run.process.returncode != 0 and len(run.errors()) == 1, run.stderr()
    assert not run.left()
    assert not (run.run_dir / "summary.json").exists()
    error = run.errors()[0].removeprefix("error: ")
    assert error in (run.run_dir / "logs" / "trainer.log").read_text()
    return error


def one_rank(
    workplace: Workplace, launch: Any, base: dict[str, Any], name: str, **changes: Any
) -> TrainerRun:
    changes = {"parallel__world_size": 1, **changes}
    return launch(workplace.recipe(base, name, **changes), num_ranks=1)


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(workplace, launch) -> None:
    folder = workplace.folder / "judge-cut"
    shutil.copytree(workplace.judge, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    save_file(tensors | {name: tensors[name][:, :64].contiguous()}, folder / "model.safetensors")
    changes = {"servers__judge__model": str(folder), "servers__judge__max_restarts": 0}
    run = one_rank(workplace, launch, SIP, "nojudge", **changes)
    error = failure(run)
    assert error == 'server "judge": exited with code 1'
    said = run.stderr()
    assert "last lines of" in said and "judge.log:" in said and "command: " in said
    assert "first error in its log: RuntimeError: " in said  # the tail says "see above" alone
    assert "exceeds dimension size (64)" in said


def test_a_server_of_another_model_is_refused(workplace, launch, bad_judge) -> None:
    other = {"kind": "connect", "url": bad_judge, "model": "gpt", "tokenizer": str(workplace.judge)}
    error = failure(one_rank(workplace, launch, SIP, "othermodel", servers__judge=other))
    assert error == f"server \"judge\": {bad_judge} serves ['m'], not 'gpt'"


def test_a_judge_that_fails_stops_the_run_and_gives_no_reward(workplace, launch, bad_judge) -> None:
    judge = {"kind": "connect", "url": bad_judge, "model": "m", "tokenizer": str(workplace.judge)}
    changes: dict[str, Any] = {
        "servers__judge": judge,
        "curriculum__sources": ["suffix", "rollout"],
        "objective__pair_sources": ["rollout"],
        "judge__outage_patience_s": 0.0,
    }
    without_rewriter = {k: v for k, v in SIP.items() if k != "rewriter"}
    run = one_rank(workplace, launch, without_rewriter, "badjudge", **changes)
    error = failure(run)
    assert error.startswith("evaluating the start policy on ")
    assert "judge server judge: " in error and "verdicts are missing" in error
    assert "HTTP 400: out of order" in error and "judge.max_missing_rate is 5.0%" in error
    assert not list((run.run_dir / "pools").iterdir())


def test_engine_and_trainer_that_disagree_stop_the_run(workplace, launch) -> None:
    limit = 1e-12  # below rounding: two programs never agree so well
    run = one_rank(workplace, launch, SIP, "mismatch", rollout__max_logprob_mismatch=limit)
    error = failure(run)
    assert "log-probs differ from the trainer's by" in error
    assert "rollout.max_logprob_mismatch is 1e-12" in error and "attention backend" in error
    assert not run.metrics()


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(workplace, launch) -> None:
    changes = {"optimizer__lr": 1e30, "optimizer__warmup_steps": 0, "optimizer__clip_grad": 1e30}
    run = one_rank(workplace, launch, NTP, "nan", **changes)
    error = failure(run)
    assert "not finite" in error and "no weight was changed; lower optimizer.lr" in error
    steps = len(run.metrics())
    assert error.startswith(f"step {steps + 1}: ") and steps >= 1
