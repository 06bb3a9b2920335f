"""Pools to verdicts and rewards: asks the judges' servers what the cache does not know.

What cannot be judged is a missing verdict with its reason, never a score. When too many of the
questions that were sent fail, the call pauses and asks again, and in the end stops: a broken judge
must not train anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from megatron_sip import config_judge
from megatron_sip.judge.asking import Asker, Store, derived_seed
from megatron_sip.judge.novelty import Novelty
from megatron_sip.judge.schedules import next_questions
from megatron_sip.judge.scoring import finite_or_missing, score_pool
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.servers import Outage, ServerPool
from megatron_sip.serving.client import run
from megatron_sip.types import CandidatePool, PoolRewards, Question, SipSample, Verdict

Judged = tuple[list[PoolRewards], list[tuple[Verdict, ...]], dict[str, float]]
Round = list[tuple[int, Question]]  # (pool, question about it)


class Judge:
    """All criteria of a recipe; synchronous from outside, concurrent within a call."""

    def __init__(
        self,
        criteria: Sequence[config_judge.Criterion],
        *,
        servers: Mapping[str, ServedModel],
        cache: Store,
        settings: config_judge.Judge,
        prefix_text: Callable[[SipSample, int], str],
        suffix_text: Callable[[SipSample], str],
        novelty: Novelty | None = None,
        run: str = "",
    ) -> None:
        """Args: servers: by recipe name. prefix_text: (sample, n) to the text of the last n
                policy tokens of the prefix. suffix_text: text of a sample's suffix. novelty: needed
                by a criterion of this form. run: who pays, for the cache.
        Raises: ValueError naming a criterion whose server or prompt does not fit.
        """
        self._criteria, self._settings = tuple(criteria), settings
        self._asked = [c for c in criteria if not isinstance(c, config_judge.NoveltyCriterion)]
        names = [name for c in self._asked for name in c.servers]
        self._servers = {name: servers[name] for name in names if name in servers}
        self._cache = cache
        self._asker = Asker(
            self._asked,
            servers=servers,
            cache=cache,
            prefix_text=prefix_text,
            suffix_text=suffix_text,
            run=run,
        )
        self._novelty = novelty
        if novelty is None and len(self._asked) < len(self._criteria):
            raise ValueError('a criterion of form "novelty" needs token frequencies; give them')

    def judge_pools(self, pools: Sequence[CandidatePool], *, seed: int) -> Judged:
        """Ask until the schedule is done, then score.

        Args:    seed: of the run; with the sample id it decides what is asked, in which order.
        Returns: rewards and verdicts, one entry a pool; and counts: verdicts, missing (all),
                 not_asked (missing because there was nothing to judge), seconds, and those of
                 `ServerPool.counts`.
        Raises:  JudgeFailed if above judge.max_missing_rate for longer than the patience lasts;
                 ValueError if a server serves another model.
        """
        return asyncio.run(self._judge_pools(pools, seed))

    async def _judge_pools(self, pools: Sequence[CandidatePool], seed: int) -> Judged:
        start = time.monotonic()
        verdicts: list[list[Verdict]] = [[] for _ in pools]
        self._cache.refresh()
        async with ServerPool(self._servers, settings=self._settings) as servers:
            while round_ := self._next_round(pools, verdicts, seed):
                servers.num_questions += len(round_)
                answers = await self._answers(pools, round_, servers, seed)
                for (i, _), verdict in zip(round_, answers, strict=True):
                    verdicts[i].append(finite_or_missing(verdict))
        counts: dict[str, float] = {
            "verdicts": sum(map(len, verdicts)),
            "missing": sum(v.score is None for known in verdicts for v in known),
            "seconds": time.monotonic() - start,
        }
        for pool, known in zip(pools, verdicts, strict=True):
            known += self._novelty_verdicts(pool)
        rewards = [
            score_pool(known, len(pool.candidates), self._criteria, self._settings.schedule)
            for pool, known in zip(pools, verdicts, strict=True)
        ]
        return rewards, [tuple(known) for known in verdicts], counts | servers.counts()

    def _next_round(
        self, pools: Sequence[CandidatePool], verdicts: Sequence[Sequence[Verdict]], seed: int
    ) -> Round:
        """What the schedule asks next about each pool; nothing when it is done with all."""
        return [
            (i, question)
            for i, pool in enumerate(pools)
            for question in next_questions(
                self._settings.schedule,
                verdicts[i],
                len(pool.candidates),
                derived_seed(seed, pool.sample.sample_id),
                criteria=self._asked,
                both_orders=self._settings.both_orders,
                pivot=pivot_of(pool),
            )
        ]

    async def _answers(
        self, pools: Sequence[CandidatePool], round_: Round, servers: ServerPool, seed: int
    ) -> list[Verdict]:
        """Verdicts in the order of the questions; what failed is asked again after an outage."""
        answers: dict[int, Verdict] = {}
        failed: set[int] = set()

        async def ask(n: int) -> None:
            i, question = round_[n]
            answers[n], is_failed = await self._asker.answer(
                pools[i], question=question, servers=servers, seed=seed
            )
            failed.update([n] if is_failed else [])

        while True:
            try:
                await run(ask(n) for n in range(len(round_)) if n not in answers)
                servers.recovered()
                return [answers[n] for n in range(len(round_))]
            except Outage as outage:
                await servers.wait(outage)
                for n in failed:
                    answers.pop(n, None)
                failed.clear()

    def _novelty_verdicts(self, pool: CandidatePool) -> list[Verdict]:
        """One verdict for each candidate and criterion of form "novelty"."""
        verdicts = []
        for criterion in self._criteria:
            if criterion.form == "novelty":
                assert self._novelty is not None
                for i, candidate in enumerate(pool.candidates):
                    score = self._novelty.score(candidate, pairs=criterion.pairs)
                    said = "not asked: no token to count" if score is None else f"{score:.6g}"
                    verdict = Verdict(criterion.name, i, -1, 0, score, said)
                    verdicts.append(finite_or_missing(verdict))
        return verdicts


def pivot_of(pool: CandidatePool) -> int | None:
    """Place of the original suffix in a pool; None if it is not in it."""
    return next((i for i, c in enumerate(pool.candidates) if c.source == "suffix"), None)
