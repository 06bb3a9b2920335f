"""Metrics of a run: their table, the JSON-lines file and sinks, phase times, means over ranks.

No metric has a name outside the table, so that what is logged is what is documented.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Metric:
    """What a number is."""

    unit: str
    meaning: str
    clock: bool = False
    """Depends on the clock or the machine, so it is no part of what two equal runs share."""


METRICS: dict[str, Metric] = {
    "loss": Metric("nats", "sum of the objective's terms, each over its own global count"),
    "grad_norm": Metric("1", "global gradient norm before clipping"),
    "lr": Metric("1", "learning rate of this step"),
    "objective/nll": Metric("nats/token", "negative log-likelihood of the targets"),
    "objective/suffix_nll": Metric("nats/token", "... of the original suffixes beside it"),
    "objective/chosen_nll": Metric("nats/token", "... of the chosen candidates of live pairs"),
    "objective/prefix_nll": Metric("nats/token", "... of the prefixes"),
    "objective/dpo": Metric("nats/pair", "DPO loss; ln 2 where policy = reference"),
    "objective/simpo": Metric("nats/pair", "SimPO loss"),
    "objective/margin": Metric("nats", "log-ratio (simpo: log-prob) of chosen minus of rejected"),
    "objective/margin_accuracy": Metric("fraction", "live pairs with a positive margin"),
    "objective/chosen_logratio": Metric("nats", "policy minus reference, sum over a chosen"),
    "objective/rejected_logratio": Metric("nats", "policy minus reference, sum over a rejected"),
    "objective/entropy": Metric("nats/token", "entropy of the policy where live tokens are scored"),
    "objective/chosen_logprob": Metric("nats/token", "simpo: mean log-prob of a chosen"),
    "objective/rejected_logprob": Metric("nats/token", "simpo: mean log-prob of a rejected"),
    "objective/grpo": Metric("1", "GRPO loss a live sample; minus the mean advantage at ratio 1"),
    "objective/ratio": Metric("1", "policy over engine probability of a sampled token"),
    "objective/clip_fraction": Metric("fraction", "tokens whose ratio is clipped: no gradient"),
    "objective/kl_reference": Metric("nats/token", "KL(policy || reference), k3 on the samples"),
    "train/skipped_steps": Metric("steps", "updates of the run so far left out: not finite"),
    "reward/chosen": Metric("reward", "total reward of the chosen; grpo: of those above the mean"),
    "reward/rejected": Metric("reward", "total reward of the rejected; grpo: of those below it"),
    "pool/rollout_chosen_rate": Metric("fraction", "pools whose best candidate is a rollout"),
    "pool/rollout_chance_rate": Metric("fraction", "the same, had the choice been uniform"),
    "pool/rollout_win_rate": Metric("fraction", "rollouts better than their suffix, ties half"),
    "pool/skipped": Metric("fraction", "picks of weight 0: no contrast, or too few candidates"),
    "pool/dropped": Metric("candidates", "candidates that a guard stopped before judging"),
    "pool/dropped_empty": Metric("candidates", "... that were blank"),
    "pool/dropped_too_short": Metric("candidates", "... shorter than an eighth of the suffix"),
    "pool/dropped_hidden_characters": Metric("candidates", "... with control or zero-width ones"),
    "pool/dropped_repetition": Metric("candidates", "... that repeat themselves"),
    "pool/dropped_copies_prefix": Metric("candidates", "... that copy the prefix"),
    "judge/verdicts": Metric("verdicts", "questions answered, cache included"),
    "judge/missing": Metric("verdicts", "questions without a usable verdict"),
    "judge/cache_hits": Metric("verdicts", "questions answered from the cache"),
    "judge/verdicts_per_s": Metric("verdicts/s", "verdicts over the judge phase", True),
    "judge/paid": Metric("verdicts", "questions that servers answered"),
    "judge/prompt_tokens": Metric("tokens", "prompt tokens that judge servers count"),
    "judge/completion_tokens": Metric("tokens", "tokens that judges wrote"),
    "judge/money": Metric("money", "of these tokens, by the servers' prices"),
    "judge/spent_questions": Metric("verdicts", "paid since the run's first step"),
    "judge/spent_tokens": Metric("tokens", "paid since the run's first step"),
    "judge/spent_money": Metric("money", "paid since the run's first step"),
    "judge/outages": Metric("pauses", "pauses because too many verdicts were missing"),
    "judge/order_consistency": Metric("share", "pairs asked in both orders with one winner"),
    "judge/second_agreement": Metric("fraction", "pools whose best a second judge puts first"),
    "judge/alarm": Metric("alarms", "what fell while the reward rose"),
    "judge/vote_agreement": Metric("share", "votes that agree with most of their question's"),
    "rewrite/rewrites": Metric("rewrites", "kept rewrites"),
    "rewrite/copied": Metric("rewrites", "kept rewrites that equal the suffix"),
    "rewrite/dropped": Metric("rewrites", "rewrites that left their pool"),
    "rewrite/dropped_refusal": Metric("rewrites", "... because the model refused"),
    "rewrite/dropped_empty": Metric("rewrites", "... whose reply held nothing"),
    "rewrite/dropped_not_text": Metric("rewrites", "... with control or zero-width characters"),
    "rewrite/dropped_too_short": Metric("rewrites", "... of fewer than half of N tokens"),
    "rewrite/dropped_unchanged_unsafe": Metric("rewrites", "... that left unsafe text as it is"),
    "rewrite/dropped_echoes_prefix": Metric("rewrites", "... that repeat the prefix"),
    "rewrite/failed": Metric("rewrites", "dropped for want of a reply"),
    "rewrite/cache_hits": Metric("rewrites", "rewrites taken from the cache"),
    "rollout/tokens_per_s": Metric("tokens/s", "generated tokens over the rollout phase", True),
    "rollout/length": Metric("tokens", "mean length of a rollout"),
    "rollout/logprob_mismatch": Metric("nats", "mean |trainer - engine| over rollout tokens"),
    "rollout/logprob_mismatch_p99": Metric("nats", "... its 99th percentile"),
    "rollout/logprob_mismatch_max": Metric("nats", "... its largest value"),
    "rollout/kl": Metric("nats/token", "KL(engine || trainer) estimated on the rollouts"),
    "policy/version": Metric("version", "weights that the rollout servers hold after the step"),
    "policy/lag": Metric("steps", "largest age of the weights that made a rollout"),
    "sync/seconds": Metric("s", "one whole weight exchange", True),
    "sync/pause_s": Metric("s", "the part of it in which the rollout servers answer nobody", True),
    "sync/transport_s": Metric("s", "... in which weights were copied to where servers read", True),
    "sync/digest_s": Metric("s", "... in which digests were made, the longer side", True),
    "sync/apply_s": Metric("s", "... in which the slowest server loaded them", True),
    "curriculum/stage": Metric("stage", "0 nll, 1 rf_nll, 2 final"),
    "curriculum/win_rate": Metric("fraction", "smoothed rollout win rate that moves the stage"),
    "data/consumed_samples": Metric("samples", "prefixes of the run so far; the data position"),
    "data/tokens": Metric("tokens", "scored tokens of the run so far"),
    "model/flops": Metric("FLOP", "matrix products of all trainer ranks, padding included"),
    "model/mfu": Metric("fraction", "model/flops over step seconds x ranks x peak", True),
    "model/train_mfu": Metric("fraction", "the same over the seconds of the train phase", True),
    "cost/trainer_device_s": Metric("device s", "ranks x seconds of train and sync", True),
    "cost/rollout_device_s": Metric("device s", "its servers x seconds of rollout and sync", True),
    "cost/rewrite_device_s": Metric("device s", "its server x seconds of rewrite", True),
    "cost/judge_device_s": Metric("device s", "its servers x seconds of judge", True),
    "cost/evaluation_device_s": Metric("device s", "all devices x seconds of evaluate", True),
    "cost/idle_device_s": Metric("device s", "cost/device_s less the five above", True),
    "cost/device_s": Metric("device s", "all devices x seconds of the step", True),
    "memory/host_gib": Metric("GiB", "resident memory of rank 0", True),
    "memory/host_peak_gib": Metric("GiB", "its peak since the start", True),
    "memory/device_peak_gib": Metric("GiB", "peak of the accelerator's memory on rank 0", True),
    "eval/nll": Metric("nats/token", "negative log-likelihood of validation suffixes"),
    "eval/win_rate": Metric("fraction", "policy over its start on validation prefixes, ties half"),
    "eval/win_rate_low": Metric("fraction", "lower end of its 95 % interval"),
    "eval/win_rate_high": Metric("fraction", "upper end of its 95 % interval"),
    "eval/second_win_rate": Metric("fraction", "the same under the start policy's likelihood"),
    "eval/judge_score": Metric("nats/token", "mean judge log-prob of the continuations"),
    "eval/distinct2": Metric("fraction", "different bigrams among all of the continuations"),
}  # fmt: skip
PATTERNS: dict[str, Metric] = {
    r"rollout/server_s/[^/\s]+": Metric("s", "to the last rollout of the server so named", True),
    r"sync/server_s/[^/\s]+": Metric("s", "in which it worked at the weight exchange", True),
    r"reward/[^/\s]+": Metric("reward", "mean over valid candidates of the criterion so named"),
    r"judge/canary_accuracy/[^/\s]+": Metric("fraction", "canaries that this criterion got right"),
    r"judge/canary_master_keys/[^/\s]+": Metric("fraction", "blank texts, master keys that lost"),
    r"judge/canary_calibration/[^/\s]+": Metric("fraction", "labelled pairs that it got right"),
    r"judge/canary_consistency/[^/\s]+": Metric("fraction", "... with one winner in both orders"),
    r"time/[a-z][a-z0-9_]*_s": Metric("s", "seconds of the phase so named on rank 0", True),
}


def metric(name: str) -> Metric:
    """Unit and meaning of a metric.

    Raises: ValueError for a name that neither the table nor a pattern knows.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, found in PATTERNS.items():
        if re.fullmatch(pattern, name):
            return found
    near = difflib.get_close_matches(name, METRICS, n=1)
    remedy = f'did you mean "{near[0]}"?' if near else "add it to metrics.METRICS"
    raise ValueError(f'metric "{name}" is not in the table of metrics; {remedy}')


class Sink(Protocol):
    """Someone who is told of each step besides metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (1, 2, ...); a resumed run repeats the steps after its checkpoint."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class MetricLogger:
    """Appends one JSON object a step to metrics.jsonl, then tells the sinks.

    Each line is on its way when `log` returns. A resumed run repeats the steps after its
    checkpoint: the last line of a step counts. Half a line, left by a run that was killed while
    writing, is removed.
    """

    def __init__(self, run_dir: Path, *, after: int = 0) -> None:
        """Args: after: step that the run goes on from."""
        self.sinks: list[Sink] = []
        path = run_dir / "metrics.jsonl"
        self._file = path.open("ab+")
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = {int(json.loads(line)["step"]): line for line in whole.splitlines()}
        self.last_step = max(lines, default=0)
        """Of those that the file held before."""
        self._recorded = {step: line for step, line in lines.items() if step > after}

    def log(self, step: int, metrics: Mapping[str, float], *, replayed: bool = False) -> None:
        """Write one line, keys sorted, and hand the same numbers to every sink.

        JSON has no NaN: such a number becomes null, and "non_finite" says what it was.

        Args:   replayed: learned again from recorded pools. If the file has the step, its line
                stands, which also says what asking the servers took, and the sinks get that.
        Raises: ValueError for an unknown metric; nothing is written then.
        """
        for name in metrics:
            metric(name)
        values = {name: float(value) for name, value in metrics.items()}
        if replayed and step in self._recorded:
            values = _values(self._recorded[step])
        else:
            self._write(step, values)
        for sink in self.sinks:
            sink.log(step, values)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        strange = {name: str(v) for name, v in values.items() if not math.isfinite(v)}
        line: dict[str, Any] = {"step": step, **values, **dict.fromkeys(strange)}
        if strange:
            line["non_finite"] = strange
        self._file.write(json.dumps(line, sort_keys=True, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _values(line: bytes) -> dict[str, float]:
    """The numbers of a line that `MetricLogger` wrote."""
    fields = json.loads(line)
    strange = fields.pop("non_finite", {})
    del fields["step"]
    return fields | {name: float(text) for name, text in strange.items()}


class PhaseTimer:
    """Seconds by phase: `with timer("rollout"): ...`, repeated phases add up.

    A phase inside another counts in both. `current` is the innermost open phase, "" between
    phases; another thread may read it.
    """

    def __init__(
        self,
        *,
        on_phase: Callable[[str], None] = lambda phase: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args: on_phase: told the name of each phase as it begins (the console)."""
        self.current = ""
        self._on_phase, self._clock = on_phase, clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer, start = self.current, self._clock()
        self.current = phase
        self._on_phase(phase)
        try:
            yield
        finally:
            self.current = outer
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """{"time/rollout_s": seconds, ...} of the phases closed since the last call."""
        taken = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


def reduce_means(ranks: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Global means from each rank's (sum, count).

    Args:    ranks: for each rank, name -> (sum, count); a rank may lack a name.
    Returns: name -> sum of sums / sum of counts, names sorted; absent where nothing was counted.
    """
    means = {}
    for name in sorted({name for rank in ranks for name in rank}):
        pairs = [rank[name] for rank in ranks if name in rank]
        count = sum(count for _, count in pairs)
        if count:
            means[name] = sum(total for total, _ in pairs) / count
    return means
