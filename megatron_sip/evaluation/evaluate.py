"""Compare the policy with its own start on held-out prefixes, at the start and at the end.

Both policies continue the same test prefixes at T = 1 with the same fixed seeds. A prefix is won
by the higher mean log-prob under the judge (ties half). Beside the win rate stand what it could
cost: held-out NLL of the true suffixes and distinct-2 of the continuations; and the win rate under
a second scorer that gave no reward, the start policy itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sip.config import Evaluation
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.evaluation.statistics import (
    bootstrap_interval,
    distinct_n_by_sets,
    mean_length,
    wins,
)
from megatron_sip.forward import token_logprobs
from megatron_sip.judge.judge import Judge
from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, segment_lengths, segment_sums
from megatron_sip.parallel import Ranks, gather_objects, shard
from megatron_sip.rollout.vllm_engine import VllmEngine
from megatron_sip.rows import make_rows
from megatron_sip.types import Candidate, CandidatePool, Pick, SipSample

DISTINCT_SET = 128  # candidates that one distinct-2 is taken over
Continued = tuple[list[list[Candidate]], np.ndarray]
NUM_CANDIDATES = 4  # of each prefix; the first is judged, all count for diversity and length


@dataclass(frozen=True)
class PolicyOutput:
    """One policy on all test prefixes, on rank 0; arrays of length n, nats a token."""

    documents: np.ndarray  # int64[n], the document of each prefix
    nll: np.ndarray  # of the true suffix
    candidates: tuple[tuple[Candidate, ...], ...]  # of each prefix; empty for next-token prediction
    judge: np.ndarray  # mean log-prob of the first candidate under the judge
    second: np.ndarray  # mean log-prob of the first candidate under the second scorer


def mean_logprobs(
    model: Any,
    samples: Sequence[SipSample],
    candidates: Sequence[Candidate] | None,
    *,
    row_length: int,
    batch: int,
    at_least: int,
    pad: int,
    device: torch.device,
) -> np.ndarray:
    """Mean log-prob of each candidate (None: the true suffix) under `model`, nats a token.

    Args:    at_least: score as many micro-batches as so many samples need: ranks that share experts
             must all compute while one does.
    Returns: float64[len(samples)] on the last pipeline stage, empty on the others. Every rank of
             the replica calls it with the same arguments.
    """
    # Equal micro-batches, as the pipeline needs.
    total = -(-max(len(samples), at_least) // batch) * batch
    index = [i % len(samples) for i in range(total)]
    pick = Pick(ORIGINAL_SUFFIX if candidates is None else 0, "target", 0.0, 1.0)
    batches = []
    for start in range(0, total, batch):
        pools = [
            CandidatePool(samples[i], "", (candidates[i],) if candidates else (), 0.0)
            for i in index[start : start + batch]
        ]
        rows = make_rows(pools, [(pick,)] * batch, length=row_length, pad=pad)
        batches.append(type(rows)(**{k: v.to(device) for k, v in vars(rows).items()}))
    values = [
        (segment_sums(lp, rows) / segment_lengths(rows)).double().cpu().numpy()
        for rows, lp in zip(batches, token_logprobs(model, batches), strict=False)
    ]
    return np.concatenate(values)[: len(samples)] if values else np.zeros(0)


@dataclass
class Evaluator:
    """Holds the fixed test prefixes of one data-parallel replica."""

    settings: Evaluation
    samples: Sequence[SipSample]  # all n, the same on every rank
    tokenizer: Tokenizer
    ranks: Ranks
    row_length: int
    device: torch.device
    engine: VllmEngine | None = None  # I/O ranks of a SIP run
    judge: Judge | None = None
    batch: int = 8

    def measure(
        self,
        policy: Any,
        second: Any,
        share: Callable[[Any], Any],
        ask: Callable[[Callable[[], Continued]], Continued | None],
    ) -> PolicyOutput | None:
        """Run the policy over all prefixes; every rank calls it, rank 0 gets the result.

        Args:    second: module that scores the continuations a second time, or None.
                 share: hands the I/O rank's object to its whole replica.
                 ask: has every I/O rank ask servers, again if one failed and came back.
        """
        mine = [self.samples[i] for i in shard(len(self.samples), self.ranks)]
        part: dict[str, Any] = {"nll": -self._score(policy, mine, None)}
        candidates, scores = share(ask(lambda: self._continue(mine)))
        if self.engine_used:
            first = [of_sample[0] for of_sample in candidates]
            part["second"] = self._score(second, mine, first) if second is not None else None
        holds = {"io": self.ranks.is_io, "loss": self.ranks.reports_loss}
        parts = gather_objects((self.ranks.dp_rank, holds, part, candidates, scores), self.ranks)
        return self._join(parts) if self.ranks.is_main else None

    @property
    def engine_used(self) -> bool:
        """True when this run has servers (every rank of a SIP run answers alike)."""
        return self.settings.server != ""

    def _score(
        self, model: Any, samples: Sequence[SipSample], candidates: Sequence[Candidate] | None
    ) -> np.ndarray:
        largest = -(-len(self.samples) // self.ranks.dp_size)  # share of a replica
        return mean_logprobs(
            model, samples, candidates, row_length=self.row_length, batch=self.batch,
            at_least=largest, pad=self.tokenizer.eod, device=self.device,
        )  # fmt: skip

    def _continue(self, samples: Sequence[SipSample]) -> Continued:
        """Continuations of each prefix, and the first one's mean log-prob under the judge."""
        if self.engine is None or self.judge is None:
            return [], np.zeros(0)
        candidates = self.engine.generate(samples, NUM_CANDIDATES, seed=self.settings.seed, step=0)
        pools = [
            CandidatePool(s, self.tokenizer.decode(s.prefix_ids), (c[0],), 1.0)
            for s, c in zip(samples, candidates, strict=True)
        ]
        rewards, _, _ = self.judge.judge_pools(pools, seed=self.settings.seed)
        return candidates, np.array([r.total[0] for r in rewards], np.float64)

    def _join(self, parts: Sequence[tuple[int, dict, dict, Any, Any]]) -> PolicyOutput:
        """All replicas' parts in the order of the prefixes."""
        by_io = sorted((p for p in parts if p[1]["io"]), key=lambda p: p[0])
        by_loss = sorted((p for p in parts if p[1]["loss"]), key=lambda p: p[0])
        second = [p[2]["second"] for p in by_loss if p[2].get("second") is not None]
        return PolicyOutput(
            documents=np.array([s.document_id for s in self.samples]),
            nll=np.concatenate([p[2]["nll"] for p in by_loss]),
            candidates=tuple(tuple(of_sample) for p in by_io for of_sample in p[3]),
            judge=np.concatenate([p[4] for p in by_io]),
            second=np.concatenate(second) if second else np.zeros(0),
        )


def as_metrics(result: dict[str, Any]) -> dict[str, float]:
    """What `compare` found, under the names of metrics."""
    names = {
        "eval/nll": "heldout_nll_end",
        "eval/win_rate": "win_rate",
        "eval/second_win_rate": "second_win_rate",
        "eval/judge_score": "judge_score_end",
        "eval/distinct2": "distinct2_end",
    }
    metrics = {name: float(result[key]) for name, key in names.items() if key in result}
    if "win_rate_ci" in result:
        metrics["eval/win_rate_low"], metrics["eval/win_rate_high"] = result["win_rate_ci"]
    return metrics


def compare(start: PolicyOutput, end: PolicyOutput, settings: Evaluation) -> dict[str, Any]:
    """`eval` of summary.json: the end policy against the start policy.

    Prefixes whose continuation the judge could not score for either policy are left out and
    counted in `unscored`. The interval resamples whole documents: prefixes of one document are
    not independent.
    """
    result: dict[str, Any] = {
        "n": len(start.nll),
        "heldout_nll_start": float(start.nll.mean()),
        "heldout_nll_end": float(end.nll.mean()),
    }
    if not start.candidates:
        return result
    scored = np.isfinite(start.judge) & np.isfinite(end.judge)
    won = wins(end.judge[scored], start.judge[scored])
    low, high = bootstrap_interval(
        won,
        groups=start.documents[scored].tolist(),
        resamples=settings.bootstrap,
        seed=settings.seed,
    )
    result |= {
        "n": int(scored.sum()),
        "unscored": int((~scored).sum()),
        "win_rate": float(won.mean()),
        "win_rate_ci": [low, high],
        "judge_score_start": float(start.judge[scored].mean()),
        "judge_score_end": float(end.judge[scored].mean()),
    }
    if len(start.second) and len(end.second):
        result["second_win_rate"] = float(wins(end.second, start.second).mean())
    for name, output in (("start", start), ("end", end)):
        by_draw = [[c.token_ids for c in draw] for draw in zip(*output.candidates, strict=True)]
        result[f"distinct2_{name}"] = float(
            np.mean([distinct_n_by_sets(draw, 2, set_size=DISTINCT_SET) for draw in by_draw])
        )
        result[f"mean_length_{name}"] = float(np.mean([mean_length(draw) for draw in by_draw]))
    return result
