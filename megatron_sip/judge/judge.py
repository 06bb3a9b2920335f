"""Pools to verdicts and rewards: asks the judges' servers what the cache does not know.

What cannot be judged is a missing verdict with its reason, never a score. When too many of the
questions that were sent fail, the whole call stops: a broken judge must not train anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from megatron_sip import config
from megatron_sip.judge.asking import Asker, derived_seed
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.novelty import Novelty
from megatron_sip.judge.schedules import next_questions
from megatron_sip.judge.scoring import finite_or_missing, score_pool
from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.servers import ServerPool
from megatron_sip.serving.client import run
from megatron_sip.types import CandidatePool, PoolRewards, SipSample, Verdict

Judged = tuple[list[PoolRewards], list[tuple[Verdict, ...]], dict[str, float]]


class Judge:
    """All criteria of a recipe; synchronous from outside, concurrent within a call."""

    def __init__(
        self,
        criteria: Sequence[config.Criterion],
        *,
        servers: Mapping[str, ServedModel],
        cache: Cache,
        settings: config.Judge,
        prefix_text: Callable[[SipSample, int], str],
        novelty: Novelty | None = None,
    ) -> None:
        """Args: servers: by recipe name. prefix_text: (sample, n) to the text of the last n
                policy tokens of the prefix. novelty: needed by a criterion of this form.
        Raises: ValueError naming a criterion whose server or prompt does not fit.
        """
        self._criteria, self._settings = tuple(criteria), settings
        self._asked = [c for c in criteria if c.form != "novelty"]
        self._servers = {c.server: servers[c.server] for c in self._asked if c.server in servers}
        self._asker = Asker(self._asked, servers=servers, cache=cache, prefix_text=prefix_text)
        self._novelty = novelty
        if novelty is None and len(self._asked) < len(self._criteria):
            raise ValueError('a criterion of form "novelty" needs token frequencies; give them')

    def judge_pools(self, pools: Sequence[CandidatePool], *, seed: int) -> Judged:
        """Ask until the schedule is done, then score.

        Args:    seed: of the run; with the sample id it decides orders of presentation.
        Returns: rewards and verdicts, one entry a pool; and counts: verdicts, missing (all),
                 not_asked (missing because there was nothing to judge), cache_hits, retries,
                 prompt_tokens (sent), seconds.
        Raises:  JudgeFailed above judge.max_missing_rate or if a server does not say what it
                 serves; ValueError if a server serves another model.
        """
        return asyncio.run(self._judge_pools(pools, seed))

    async def _judge_pools(self, pools: Sequence[CandidatePool], seed: int) -> Judged:
        start = time.monotonic()
        verdicts: list[list[Verdict]] = [[] for _ in pools]
        async with ServerPool(self._servers, settings=self._settings) as servers:
            while True:
                round_ = [
                    (i, question)
                    for i, pool in enumerate(pools)
                    for question in next_questions(
                        self._settings.schedule,
                        verdicts[i],
                        len(pool.candidates),
                        derived_seed(seed, pool.sample.sample_id),
                        criteria=self._asked,
                    )
                ]
                if not round_:
                    break
                servers.num_questions += len(round_)
                answers = await run(
                    self._asker.answer(pools[i], question=q, servers=servers, seed=seed)
                    for i, q in round_
                )
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
            score_pool(known, len(pool.candidates), self._criteria)
            for pool, known in zip(pools, verdicts, strict=True)
        ]
        return rewards, [tuple(known) for known in verdicts], counts | servers.counts()

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
