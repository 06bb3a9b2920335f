"""Selection by a judge: a pointwise criterion of a recipe, asked of each document.

Verdicts are kept in the recipe's cache, so a pass that was interrupted pays for none twice. A
document without a verdict leaves the set and is counted as such: no failure is taken for a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.config import Config
from megatron_sip.config_judge import PointwiseCriterion
from megatron_sip.data.selection.steps import Batch, Objection
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.prompts import load_prompt
from megatron_sip.judge.servers import JudgeFailed
from megatron_sip.services import served_model
from megatron_sip.serving.text_fleet import text_fleet
from megatron_sip.types import Candidate, CandidatePool, SipSample

_NOTHING = np.zeros(0, np.int32)
_ENOUGH = 20  # documents, before their rate of missing verdicts means something


class JudgeStep:
    """Keeps documents whose score is in [minimum, maximum].

    Args:   judge: of one pointwise criterion. described: what the scores depend on. minimum,
            maximum: of P(first label), in [0, 1]. max_chars: so much of a text's beginning is
            judged. max_missing_rate: of documents without a verdict in the whole pass; more of them
            raise JudgeFailed.
    Raises: ValueError if the bounds contradict each other.
    """

    name = "judge"
    columns: tuple[str, ...] = ()

    def __init__(
        self,
        judge: Judge,
        *,
        described: Mapping[str, Any],
        minimum: float,
        maximum: float,
        max_chars: int,
        max_missing_rate: float,
    ) -> None:
        if not 0 <= minimum <= maximum <= 1 or max_chars < 1:
            raise ValueError(
                f"judge: scores from {minimum} to {maximum} of {max_chars} characters: the bounds "
                "must lie in [0, 1], the lower first, and at least one character be judged"
            )
        self._judge, self._max_chars = judge, max_chars
        self._minimum, self._maximum = minimum, maximum
        self._described = dict(described)
        self._counts: dict[str, float] = {}
        self._cut = self._judged = self._missing = 0
        self._max_missing_rate = max_missing_rate

    def describe(self) -> dict[str, Any]:
        """Criterion, prompt, model and bounds."""
        bounds = {"minimum": self._minimum, "maximum": self._maximum}
        return self._described | bounds | {"max_chars": self._max_chars}

    def objections(self, batch: Batch) -> Sequence[tuple[Objection, ...]]:
        """Judges all documents of a batch at once."""
        self._cut += sum(len(text) > self._max_chars for text in batch.texts)
        pools = [
            _pool(int(number), text[: self._max_chars])
            for number, text in zip(batch.numbers, batch.texts, strict=True)
        ]
        _, verdicts, counts = self._judge.judge_pools(pools, seed=0)
        self._judged += len(pools)
        self._missing += sum(known[0].score is None for known in verdicts)
        if self._judged >= _ENOUGH and self._missing > self._max_missing_rate * self._judged:
            raise JudgeFailed(
                f"judge: {self._missing} of {self._judged} documents have no verdict, "
                f"judge.max_missing_rate is {self._max_missing_rate:.1%}; read the server's log; "
                "verdicts that were given are in the cache"
            )
        for name in ("verdicts", "missing", "cache_hits", "prompt_tokens"):
            self._counts[name] = self._counts.get(name, 0) + counts[name]
        return [self._objection(known[0].score, known[0].reply) for known in verdicts]

    def facts(self) -> dict[str, Any]:
        """Counts of verdicts, and of documents that were judged by their beginning alone."""
        return self._counts | {"judged_by_beginning": self._cut}

    def _objection(self, score: float | None, said: str) -> tuple[Objection, ...]:
        if score is None:
            return (Objection("no verdict", said),)
        if score < self._minimum:
            return (Objection("score below minimum", f"{score:.4f}"),)
        if score > self._maximum:
            return (Objection("score above maximum", f"{score:.4f}"),)
        return ()


def _pool(number: int, text: str) -> CandidatePool:
    """A document as the only candidate after an empty prefix."""
    sample = SipSample(number, number, 0, _NOTHING, _NOTHING)
    candidate = Candidate("suffix", _NOTHING, text, np.zeros(0, np.float32), -1, "data")
    return CandidatePool(sample, "", (candidate,), 0.0)


@contextmanager
def open_judge(
    config: Config, name: str, *, log_dir: Path, say: Callable[[str], None]
) -> Iterator[tuple[Judge, dict[str, Any]]]:
    """The judge of one criterion of a recipe, with its server started or reached.

    Args:   name: of a pointwise criterion. log_dir: for the server's log. say: told when the server
            is started, waited for or started anew.
    Yields: (judge, what its scores depend on).
    Raises: ValueError if there is no such criterion; ServerFailed if its server does not come up.
    """
    criteria = {c.name: c for c in config.judge.criteria} if config.judge else {}
    criterion = criteria.get(name)
    if config.judge is None or not isinstance(criterion, PointwiseCriterion):
        pointwise = [c.name for c in criteria.values() if c.form == "pointwise"]
        raise ValueError(
            f"--criterion {name!r} is no pointwise criterion of the recipe, which has "
            f"{', '.join(pointwise) or 'none'}"
        )
    with ExitStack() as stack:
        servers = stack.enter_context(
            text_fleet(config, criterion.servers, log_dir=log_dir, say=say)
        )
        cache = Cache(config.judge.cache_dir)
        stack.callback(cache.close)
        models = {n: served_model(config, n, servers.endpoints()[n]) for n in criterion.servers}
        model = models[criterion.servers[0]]  # all serve the same
        prompt = load_prompt(criterion.prompt)
        yield (
            Judge(
                [criterion],
                servers=models,
                cache=cache,
                settings=config.judge.model_copy(update={"max_missing_rate": 1.0}),
                prefix_text=lambda sample, num_tokens: "",
                suffix_text=lambda sample: "",
            ),
            {
                "criterion": criterion.name,
                "prompt": f"{prompt.name} {prompt.digest}",
                "model": f"{model.endpoint.model} {model.model_digest}",
                "tokenizer": model.tokenizer.digest if model.tokenizer else "",
            },
        )
