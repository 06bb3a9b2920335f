"""Small run folders for the tests of the report, made with the project's own writers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_sip.metrics import MetricLogger
from megatron_sip.pool_store import PoolRecord, commit_step, write_pools
from megatron_sip.recipe import load_config
from megatron_sip.run_dir import create_run_dir, write_summary
from megatron_sip.types import Candidate, CandidatePool, Pick, PoolRewards, SipSample, Verdict

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 &lt;b&gt;"
EVALUATION = {
    "n": 512, "heldout_nll_start": 4.7211, "heldout_nll_end": 4.7612, "unscored": 0,
    "win_rate": 0.7904, "win_rate_ci": [0.7686, 0.8103], "judge_score_start": -7.3172,
    "judge_score_end": -6.7461, "second_win_rate": 0.7431, "distinct2_start": 0.8603,
    "distinct2_end": 0.8143, "mean_length_start": 32.0, "mean_length_end": 32.0,
}  # fmt: skip


def reward_of(step: int, position: int, candidate: int) -> float:
    """Known rewards: the suffix (candidate 0) is best, then rollouts in order."""
    return 10.0 - candidate + 0.1 * step + 0.01 * position


def make_record(step: int, position: int, *, text: str = "") -> PoolRecord:
    """A suffix and three rollouts; the first rollout is chosen, the last rejected."""
    ids = np.array([5, 6, 7], np.int32)
    candidates = tuple(
        Candidate(
            "rollout" if c else "suffix", ids, f" candidate {c} of {step}.{position} {text}",
            np.zeros(3 if c else 0, np.float32), step if c else -1, "length" if c else "data",
        )
        for c in range(4)
    )  # fmt: skip
    total = np.array([reward_of(step, position, c) for c in range(4)], np.float32)
    sample = SipSample(100 * step + position, 3, 40, ids, ids)
    pool = CandidatePool(sample, f" prefix {step}.{position} {text}", candidates, 0.75)
    rewards = PoolRewards({"likelihood": total - 12}, total, np.ones(4, bool), 0, np.ones(4, bool))
    verdicts = (Verdict("likelihood", 0, -1, 0, -2.0, f"well said {text}"),)
    picks = (Pick(1, "chosen", 0.0, 1.0), Pick(3, "rejected", 0.0, 1.0))
    return PoolRecord(step, position, pool, rewards, verdicts, picks)


def metrics_of(step: int) -> dict[str, float]:
    """One line of a SIP run; step is numbered from 1."""
    return {
        "loss": 4 - 0.125 * step, "objective/dpo": 0.7 - 0.01 * step, "lr": 1e-4,
        "reward/chosen": 2.0, "reward/rejected": 0.5, "reward/likelihood": -3.0,
        "pool/rollout_chosen_rate": 0.25, "pool/rollout_chance_rate": 0.75,
        "pool/rollout_win_rate": 0.125, "rollout/logprob_mismatch": 1e-6,
        "time/rollout_s": 0.5, "time/judge_s": 1.0 * step, "time/train_s": 1.0,
        "time/sync_s": 0.25, "time/step_s": 2.0 + step,
    }  # fmt: skip


def write_run(
    folder: Path, *, steps: int = 4, pools: int = 2, text: str = "", finished: bool = True,
    overrides: tuple[str, ...] = (), more: Mapping[str, float] | None = None,
) -> Path:  # fmt: skip
    """A SIP run, `more` metrics logged in each step; returns its folder."""
    short = (f"run.steps={steps}", "optimizer.warmup_steps=0")
    config = load_config(ROOT / "configs" / "quickstart.toml", (*short, *overrides))
    create_run_dir(folder, config)
    logger = MetricLogger(folder)
    for step in range(steps):
        records = [make_record(step, i, text=text) for i in range(pools)]
        write_pools(folder, step, dp_rank=0, records=records)
        commit_step(folder, step, num_shards=1)
        logger.log(step + 1, metrics_of(step + 1) | dict(more or {}))
    logger.close()
    if finished:
        summary = {"task": "sip", "steps": steps, "seconds": 321.7, "consumed_samples": 8 * steps}
        write_summary(folder, {**summary, "eval": EVALUATION})
    return folder


def write_ntp_run(folder: Path) -> Path:
    """A finished next-token run; returns its folder."""
    create_run_dir(folder, load_config(ROOT / "configs" / "quickstart_ntp.toml"))
    logger = MetricLogger(folder)
    for step in (1, 2, 3):
        logger.log(step, {"loss": 9.0 - step, "objective/nll": 8.0 - step, "time/step_s": 1.0})
    logger.close()
    evaluation = {"n": 256, "heldout_nll_start": 8.374, "heldout_nll_end": 4.727}
    write_summary(folder, {"task": "ntp", "steps": 3, "seconds": 234.4, "eval": evaluation})
    return folder
