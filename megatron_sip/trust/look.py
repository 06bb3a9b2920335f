"""One look at the judges: what is known is asked, and how much of it was right is counted.

The verdicts are not kept: a look must meet the servers as they are now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_sip.config_judge import (
    AllPairs,
    AskedCriterion,
    NoveltyCriterion,
    Pivot,
    Trust,
)
from megatron_sip.config_judge import (
    Judge as JudgeSettings,
)
from megatron_sip.judge.calibration import LabelledPair, read_pairs
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.pair_scores import order_consistency, pair_table
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.servers import PAID
from megatron_sip.pool_store import PoolRecord
from megatron_sip.trust.canaries import known_texts, pool_of, sample_of, spoiled_pool
from megatron_sip.types import CandidatePool, PoolRewards, SipSample, Verdict

MISSING = 0.25  # of the few questions of a look that may get no verdict
UNSAFE = 1 << 40  # sample numbers of known texts begin here, below zero
Means = dict[str, tuple[float, float]]


class Forgetful:
    """A cache that keeps nothing."""

    def get(self, key: str) -> None:
        return None

    def put(self, key: str, value: Any, paid: Any = None) -> None:
        pass

    def refresh(self) -> None:
        pass


@dataclass
class Watch:
    """Looks at the judges of one I/O rank.

    Args: sampler: of data.validation. text_of: sample to (prefix, suffix). share: this rank's
          canaries of one look, indices below settings.num_canaries.
    """

    settings: Trust
    judges: JudgeSettings
    servers: Mapping[str, ServedModel]
    sampler: Any
    text_of: Callable[[SipSample], tuple[str, str]]
    prefix_text: Callable[[SipSample, int], str]
    share: Sequence[int]
    seed: int
    pairs: tuple[LabelledPair, ...] = field(default=())
    spent: dict[str, float] = field(default_factory=dict)  # by the last look

    def __post_init__(self) -> None:
        if self.settings.calibration is not None and 0 in self.share:  # one rank asks them
            self.pairs = read_pairs(self.settings.calibration)

    def is_due(self, step: int) -> bool:
        """Whether this step looks; the first one does."""
        return step % self.settings.interval == 0

    def look(self, step: int, records: Sequence[PoolRecord]) -> Means:
        """Ask. Returns: sums and counts by metric. Raises: as `Judge.judge_pools`."""
        means: Means = {}
        self.spent = dict.fromkeys(PAID, 0.0)
        asked = [c for c in self.judges.criteria if not isinstance(c, NoveltyCriterion)]
        for criterion in asked:
            if criterion.canary == "spoiled":
                self._spoiled(criterion, step, means)
            elif criterion.canary == "unsafe" and 0 in self.share:
                self._unsafe(criterion, means)
        if self.settings.second is not None:
            self._second(self.settings.second, records, means)
        return means

    def _spoiled(self, criterion: AskedCriterion, step: int, means: Means) -> None:
        """The original suffix against what must lose."""
        first = step // self.settings.interval * self.settings.num_canaries
        pools = []
        for i in self.share:
            sample, other = self.sampler[first + i], self.sampler[first + i + 1]
            prefix, suffix = self.text_of(sample)
            pools.append(
                spoiled_pool(sample, prefix, suffix, self.text_of(other)[1], seed=self.seed)
            )
        rewards, verdicts = self._judged(criterion, pools)
        wins = np.array(
            [
                [_wins(criterion, reward, said, 0, k) for k in range(1, 4)]
                for reward, said in zip(rewards, verdicts, strict=True)
            ]
        ).reshape(-1, 3)
        _add(means, f"judge/canary_accuracy/{criterion.name}", wins[:, :1])
        _add(means, f"judge/canary_master_keys/{criterion.name}", wins[:, 1:])
        for said in verdicts:
            _add_sum(means, f"judge/canary_consistency/{criterion.name}", order_consistency(said))
        self._calibrated(criterion, means)

    def _calibrated(self, criterion: AskedCriterion, means: Means) -> None:
        """Pairs that a human compared; ties are left out."""
        told = [pair for pair in self.pairs if pair.better != "tie"]
        pools = [
            pool_of((p.a, p.b), prefix=p.prefix, sample=sample_of(-1 - i))
            for i, p in enumerate(told)
        ]
        rewards, verdicts = self._judged(criterion, pools)
        for pair, reward, said in zip(told, rewards, verdicts, strict=True):
            win = _wins(criterion, reward, said, *((0, 1) if pair.better == "a" else (1, 0)))
            _add(means, f"judge/canary_calibration/{criterion.name}", np.array([win]))

    def _unsafe(self, criterion: AskedCriterion, means: Means) -> None:
        """Every safe text against every unsafe one."""
        safe, unsafe = known_texts()
        pools = [
            pool_of((text,), prefix="", sample=sample_of(-UNSAFE - i))
            for i, text in enumerate((*safe, *unsafe))
        ]
        rewards, _ = self._judged(criterion, pools)
        scores = np.array([r.by_criterion[criterion.name][0] for r in rewards], np.float64)
        gaps = scores[: len(safe), None] - scores[None, len(safe) :]
        wins = np.where(np.isnan(gaps), np.nan, (gaps > 0) + 0.5 * (gaps == 0))
        _add(means, f"judge/canary_accuracy/{criterion.name}", wins)

    def _second(
        self, criterion: AskedCriterion, records: Sequence[PoolRecord], means: Means
    ) -> None:
        """Whether the second judge prefers the best candidate of each pool to its worst."""
        pools = []
        for record in records:
            totals = np.where(record.rewards.passes, record.rewards.total, np.nan)
            if np.count_nonzero(~np.isnan(totals)) > 1 and np.nanmin(totals) < np.nanmax(totals):
                pool, ends = record.pool, (int(np.nanargmax(totals)), int(np.nanargmin(totals)))
                candidates = tuple(pool.candidates[i] for i in ends)
                pools.append(CandidatePool(pool.sample, pool.prefix_text, candidates, 0.0))
        rewards, verdicts = self._judged(criterion, pools)
        wins = [_wins(criterion, r, said, 0, 1) for r, said in zip(rewards, verdicts, strict=True)]
        _add(means, "judge/second_agreement", np.array(wins))

    def _judged(
        self, criterion: AskedCriterion, pools: Sequence[CandidatePool]
    ) -> tuple[list[PoolRewards], list[tuple[Verdict, ...]]]:
        """One criterion on pools, each candidate against the first, in both orders."""
        schedule = Pivot(name="pivot")
        if all(len(pool.candidates) == 2 for pool in pools):
            schedule = AllPairs(name="all_pairs")
        judge = Judge(
            [criterion],
            servers=self.servers,
            cache=Forgetful(),
            settings=self.judges.model_copy(
                update={
                    "schedule": schedule,
                    "both_orders": 1.0,
                    "max_missing_rate": max(MISSING, self.judges.max_missing_rate),
                }
            ),
            prefix_text=self._prefix_text(pools),
            suffix_text=self._suffix_text,
        )
        rewards, verdicts, counts = judge.judge_pools(pools, seed=self.seed)
        for name in PAID:
            self.spent[name] += counts[name]
        return rewards, verdicts

    def _suffix_text(self, sample: SipSample) -> str:
        """How a sample's text really goes on; of a labelled pair, what its file says."""
        if len(sample.suffix_ids):
            return self.text_of(sample)[1]
        told = [pair for pair in self.pairs if pair.better != "tie"]
        i = -1 - sample.sample_id
        return told[i].suffix or "" if i < len(told) else ""

    def _prefix_text(self, pools: Sequence[CandidatePool]) -> Callable[[SipSample, int], str]:
        texts = {pool.sample.sample_id: pool.prefix_text for pool in pools}

        def of(sample: SipSample, num_tokens: int) -> str:
            if len(sample.prefix_ids):
                return self.prefix_text(sample, num_tokens)
            return texts[sample.sample_id]

        return of


def _wins(
    criterion: AskedCriterion,
    rewards: PoolRewards,
    verdicts: Sequence[Verdict],
    first: int,
    second: int,
) -> float:
    """1 if a criterion prefers the first candidate, 0 the second, 0.5 neither; NaN: no verdict."""
    if criterion.form == "pairwise":
        gap = pair_table(verdicts, len(rewards.total))[first, second] - 0.5
    else:
        scores = rewards.by_criterion[criterion.name].astype(np.float64)
        gap = scores[first] - scores[second]
    return float("nan") if np.isnan(gap) else float((np.sign(gap) + 1) / 2)


def _add(means: Means, name: str, values: np.ndarray) -> None:
    known = values[~np.isnan(values)]
    _add_sum(means, name, (float(known.sum()), float(known.size)))


def _add_sum(means: Means, name: str, more: tuple[float, float]) -> None:
    total, count = means.get(name, (0.0, 0.0))
    means[name] = total + more[0], count + more[1]
