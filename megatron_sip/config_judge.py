"""The recipe's [judge] and [rewriter]: who is asked what about a pool, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_sip.config_base import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    Share,
)


class Labels(Section):
    """The verdict is the probabilities of label tokens, read in prefill: nothing is generated."""

    kind: Literal["labels"]


class Reasoned(Section):
    """The model reasons, then names its verdict in a form that the server enforces."""

    kind: Literal["reasoned"]
    max_tokens: PositiveInt = 512
    """Limit of reasoning and verdict, the judge's tokens."""
    temperature: NonNegative = 1.0
    top_p: Fraction = 1.0
    votes: PositiveInt = 1
    """Samples of each verdict; its score is their mean."""


Answer = Annotated[Labels | Reasoned, Field(discriminator="kind")]
LABELS = Labels(kind="labels")


class Scored(Section):
    """What every criterion has."""

    name: str
    weight: float = 1.0
    """Of its score in the total reward."""
    gate: float | None = None
    """A candidate that scores below is never preferred (chosen, imitated, reinforced); it ranks
    below all that pass and may be rejected. Left out: no gate."""
    normalize: Literal["none", "rank", "standard"] = "none"
    """Scores of one pool before they are weighted. rank: 0 for the worst to 1 for the best.
    standard: mean 0 and standard deviation 1."""


class Asked(Scored):
    """What every criterion has that asks a server."""

    server: str | tuple[str, ...]
    """Who answers. Several serve the same model; all questions on one prefix meet the same one."""

    canary: Literal["spoiled", "unsafe", "none"] = "none"
    """What it must tell apart when it is looked at ([judge.trust]). spoiled: the original suffix
    from a spoiled one. unsafe: safe texts from unsafe ones. none: it is not looked at."""

    @property
    def servers(self) -> tuple[str, ...]:
        return (self.server,) if isinstance(self.server, str) else self.server


class LikelihoodCriterion(Asked):
    """Mean log-prob of the candidate under the judge model, nats a token."""

    form: Literal["likelihood"]
    canary: Literal["spoiled", "unsafe", "none"] = "spoiled"
    prefix_tokens: PositiveInt = 2048
    """Judge sees at most this many of the prefix's last policy tokens."""
    white_space: bool = True
    """Whether tokens of white space alone count; a paragraph break is an easy guess."""


class ClassifierCriterion(Asked):
    """A reward model or classifier behind vLLM reads prefix and candidate."""

    form: Literal["classifier"]
    route: Literal["classify", "pooling"]
    """classify: the score is the probability of class `output`. pooling: the number at place
    `output` of what the model gives, before softmax or sigmoid (a reward model's reward)."""
    output: NonNegativeInt = 0
    prefix_tokens: NonNegativeInt = 2048
    """It sees at most this many of the prefix's last policy tokens; 0: the candidate alone."""


class PromptedCriterion(Asked):
    """What every criterion has that asks by a prompt."""

    prompt: str
    """Name of a file in megatron_sip/prompts, or path of a file of your own (NAME_vN.txt)."""
    answer: Answer = LABELS
    """How the verdict is read."""


class PairwiseCriterion(PromptedCriterion):
    """Which of two candidates is better."""

    form: Literal["pairwise"]
    canary: Literal["spoiled", "none"] = "spoiled"  # pyright: ignore[reportIncompatibleVariableOverride]


class PointwiseCriterion(PromptedCriterion):
    """Yes or no on one candidate."""

    form: Literal["pointwise"]
    canary: Literal["spoiled", "unsafe", "none"] = "unsafe"


class GradedCriterion(PromptedCriterion):
    """One of several levels for one candidate, with the original suffix as the truth."""

    form: Literal["graded"]


class NoveltyCriterion(Scored):
    """Expected share of the candidate's word pairs that other texts do not hold, in [0, 1].

    Asks no server. Beside a likelihood it keeps common phrases from being all that is learned.
    """

    form: Literal["novelty"]
    pairs: PositiveInt = 4096
    """Word pairs of the other texts; their frequencies are those of data.train."""


AskedCriterion = (
    LikelihoodCriterion
    | ClassifierCriterion
    | PairwiseCriterion
    | PointwiseCriterion
    | GradedCriterion
)
Criterion = Annotated[AskedCriterion | NoveltyCriterion, Field(discriminator="form")]


class AllPairs(Section):
    """Every pair of candidates: C (C - 1) / 2 questions."""

    name: Literal["all_pairs"]


class RandomPairs(Section):
    """Each candidate meets the same number of others, drawn by seed."""

    name: Literal["random_pairs"]
    opponents: PositiveInt = 4
    """Of each candidate; C x opponents / 2 questions."""


class Pivot(Section):
    """Each candidate meets the original suffix, or where the pool has none one drawn by seed:
    C - 1 questions."""

    name: Literal["pivot"]


class Bracket(Section):
    """Winners meet winners and losers losers: best and worst in ceil(3 C / 2) - 2 questions."""

    name: Literal["bracket"]


class Adaptive(Section):
    """A ring of all candidates, then those that may be best or worst, to a budget of questions."""

    name: Literal["adaptive"]
    budget: Fraction = 0.25
    """Share of the questions of all pairs; 1.5 a candidate are asked in any case."""


Schedule = Annotated[
    AllPairs | RandomPairs | Pivot | Bracket | Adaptive, Field(discriminator="name")
]


class Guards(Section):
    """When a candidate leaves the pool before a question about it is paid."""

    max_repeated: Share = 0.5
    """Largest share of its word 3-grams that stood in it before; 1: not looked at."""
    min_compressed: Share = 0.25
    """Smallest ratio of its compressed bytes to its bytes (from 200 on); 0: not looked at."""
    max_copied: Share = 0.8
    """Largest share of its word 8-grams that stand in the prefix; 1: not looked at."""
    hidden_characters: bool = True
    """Whether control, zero-width and private characters are a reason."""


class SpendLimit(Section):
    """What the run may spend on judges; it stops with a checkpoint at the first step above."""

    questions: PositiveInt | None = None
    """Questions that servers answered; those of the cache are free."""
    tokens: PositiveInt | None = None
    """Prompt and completion tokens together."""
    money: Positive | None = None
    """By the prices of the servers ([servers.NAME] prompt_price, completion_price)."""


class Trust(Section):
    """Whether the judges can be believed: every `interval` steps they are asked what is known."""

    interval: PositiveInt
    """Steps between two looks."""
    num_canaries: PositiveInt = 32
    """Prefixes of data.validation at each look, new ones each time."""
    calibration: Path | None = None
    """Pairs with a human's verdict (.jsonl: prefix, a, b, better), asked at each look as well."""
    min_accuracy: Share = 0.6
    """Share of what is known that a criterion must get right, each by itself, or the run stops."""
    min_order_consistency: Share = 0.0
    """Share of pairs with one winner in both orders that a pairwise criterion must reach."""
    second: AskedCriterion | None = Field(default=None, discriminator="form")
    """A judge that gives no reward: how often it, too, prefers the best candidate to the worst."""
    window: Annotated[int, Field(ge=4)] = 8
    """Steps with a value over which the alarm compares the first half with the second."""


class Judge(Section):
    criteria: tuple[Criterion, ...] = Field(min_length=1)
    schedule: Schedule = AllPairs(name="all_pairs")
    """Which pairs of a pool the pairwise criteria are asked about."""
    both_orders: Share = 0.1
    """Share of the pairs that are asked in both orders; where the two disagree it is a tie. The
    others are asked in one order, drawn by seed."""
    guards: Guards = Guards()
    limit: SpendLimit = SpendLimit()
    trust: Trust | None = None
    cache_dir: Path
    """Verdicts and rewrites by content, kept across runs; a local disk."""
    concurrency: PositiveInt = 16
    """Questions in flight on one data-parallel rank."""
    timeout_s: Positive = 120.0
    """Deadline of one request, retries included."""
    max_missing_rate: Fraction = 0.05
    """Missing verdicts of one step above which the run pauses."""
    outage_patience_s: NonNegative = 600.0
    """How long it then waits and asks again before it makes a checkpoint and stops."""


class Rewriter(Section):
    server: str
    prompt: str
    temperature: NonNegative = 0.7
    top_p: Fraction = 0.95
    prefix_tokens: PositiveInt = 2048
    """Rewriter sees at most this many of the prefix's last policy tokens."""
    max_tokens: PositiveInt
    """Limit of the rewriter's own tokens; the result is cut to data.suffix_tokens."""
    concurrency: PositiveInt = 16
    timeout_s: Positive = 120.0
