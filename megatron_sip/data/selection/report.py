"""`PREFIX.NAME.report.json`: what a selection left out, by rule, with examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_sip.data.selection.steps import Batch, Objection

EXCERPT = 160  # characters
EXAMPLES = 5  # a rule
_DETAIL = 400  # characters


class Example(BaseModel):
    """One document that left."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    document: int
    detail: str
    excerpt: str


class StepReport(BaseModel):
    """One step."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    name: str
    settings: dict[str, Any]
    seen: int
    """Documents that the earlier steps had left in the set."""
    left_out: int
    by_rule: dict[str, int]
    """Documents that broke each rule; one that broke several counts for each."""
    examples: dict[str, tuple[Example, ...]]
    """The first documents that broke each rule."""
    facts: dict[str, Any]


class MaskReport(BaseModel):
    """What made a mask."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    name: str
    base: str
    documents: int
    """In the dataset."""
    base_selected: int
    selected: int
    min_tokens: int
    steps: tuple[StepReport, ...]
    idx_xxh3_128: str
    """Digest of the dataset's .idx."""
    payload_xxh3_128: str
    """Digest of the mask that this report belongs to."""


class StepTally:
    """Counts and examples of one step while it runs."""

    def __init__(self) -> None:
        self.seen = self.left_out = 0
        self.by_rule: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}

    def add(self, batch: Batch, objections: Sequence[tuple[Objection, ...]]) -> None:
        """Count what a step said of a batch."""
        self.seen += len(batch)
        for number, text, found in zip(batch.numbers, batch.texts, objections, strict=True):
            self.left_out += bool(found)
            for objection in found:
                self.by_rule[objection.rule] += 1
                kept = self.examples.setdefault(objection.rule, [])
                if len(kept) < EXAMPLES:
                    detail = objection.detail[:_DETAIL]
                    excerpt = excerpt_of(text)
                    kept.append(Example(document=int(number), detail=detail, excerpt=excerpt))

    def report(self, name: str, settings: dict[str, Any], facts: dict[str, Any]) -> StepReport:
        """What was counted, rules by name."""
        return StepReport(
            name=name,
            settings=settings,
            seen=self.seen,
            left_out=self.left_out,
            by_rule=dict(sorted(self.by_rule.items())),
            examples={rule: tuple(kept) for rule, kept in sorted(self.examples.items())},
            facts=facts,
        )


def excerpt_of(text: str) -> str:
    """The first EXCERPT characters on one line."""
    line = " ".join(text[: 4 * EXCERPT].split())
    return line if len(line) <= EXCERPT and len(text) <= 4 * EXCERPT else f"{line[:EXCERPT]}..."
