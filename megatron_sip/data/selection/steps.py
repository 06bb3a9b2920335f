"""What a step of a selection is: it sees documents in batches and says what speaks against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Documents that are still in the set, n of them.

    Args: numbers: int64[n], ascending document numbers of the dataset.
          texts: n, decoded, without their end-of-document id.
          columns: name to n values of `PREFIX.documents.parquet`, None where a record had none;
          those that the step asked for are among them.
    """

    numbers: np.ndarray
    texts: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]]

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, stays: np.ndarray) -> Batch:
        """The documents i with stays[i]. Args: stays: bool[n]."""
        places = np.flatnonzero(stays).tolist()
        return Batch(
            self.numbers[places],
            tuple(self.texts[i] for i in places),
            {name: tuple(values[i] for i in places) for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class Objection:
    """Why one document leaves the set.

    Args: rule: by which the report counts. detail: of this document, for the report's examples.
    """

    rule: str
    detail: str


class Step(Protocol):
    """One way to choose documents, by rules, by other documents or by a judge.

    An object serves one pass over one dataset: it may remember what it saw. All documents of a
    batch are handed over at once, so a step that asks a server can ask for them together.
    """

    @property
    def name(self) -> str:
        """In the mask's rule and in the report."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `PREFIX.documents.parquet` that `objections` reads."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that the result depends on, as JSON: settings, and sha256 of files that were given.

        Read before the pass.
        """
        ...

    def objections(self, batch: Batch) -> Sequence[tuple[Objection, ...]]:
        """For each document why it leaves, empty: it stays. Batches come in document order.

        How the documents are parted into batches must not change the answers.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What else the report should say, as JSON. Read after the pass."""
        ...
