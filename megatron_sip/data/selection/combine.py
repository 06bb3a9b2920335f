"""Write a mask: a base mask without the documents that some step objects to.

The dataset is read once, in order. Each step sees the documents that the steps before it left in,
so near duplicates are looked for among what would be trained on. The mask appears when all is
known; an interrupted run leaves nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.data.document_mask import DocumentMask, load_mask, mask_of
from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.manifest import part_path
from megatron_sip.data.selection.documents import batches
from megatron_sip.data.selection.report import MaskReport, StepTally
from megatron_sip.data.selection.steps import Batch, Step
from megatron_sip.data.storage import is_url
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.publish import atomic_write

ELIGIBLE = "eligible"  # the mask that every dataset has
RESERVED = ("bin", "idx", "manifest", "documents", ELIGIBLE)
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_MAX_RULE = 1 << 19  # bytes; a mask's header may take twice as much

Progress = Callable[[int, int], None]
"""Called with (documents done, documents of the dataset) after each batch."""


def write_mask(
    prefix: str | Path,
    *,
    name: str,
    base: str | None = None,
    steps: Sequence[Step],
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    progress: Progress | None = None,
) -> MaskReport:
    """Write PREFIX.NAME and PREFIX.NAME.report.json; older ones are replaced.

    Args:    prefix: path of a local dataset without `.bin`. name: of the mask.
             base: name of the mask to start from; None: "eligible". The new mask keeps its
             min_tokens. steps: in their order, at least one, each new. tokenizer: that the dataset
             was made with, read from tokenizer_path.
    Returns: the report that was written.
    Raises:  ValueError, before the dataset is read, if a name cannot be a mask's, the prefix is a
             URL, the dataset or the base is missing, damaged or of another dataset, the tokenizer
             is another, or a column is missing; and what the steps raise.
    """
    base = base or ELIGIBLE
    prefix = _check(prefix, name=name, base=base, steps=steps)
    dataset = IndexedDataset(prefix)
    try:
        dataset.check_tokenizer(tokenizer.digest, path=tokenizer_path)
        start = _load_base(prefix, base, dataset)
        settings = [step.describe() for step in steps]
        rule = _rule(base, start, steps, settings)
        members = start.members()
        tallies = [StepTally() for _ in steps]
        columns = tuple(dict.fromkeys(chain.from_iterable(step.columns for step in steps)))
        for batch, done in batches(dataset, prefix, members, columns, tokenizer):
            members[_objected(batch, steps, tallies)] = False
            if progress is not None:
                progress(done, dataset.num_documents)
    finally:
        dataset.close()
    mask = mask_of(
        members,
        min_tokens=start.header.min_tokens,
        rule=rule,
        idx_xxh3_128=dataset.manifest.idx_xxh3_128,
    )
    told = zip(steps, tallies, settings, strict=True)
    report = MaskReport(
        name=name,
        base=base,
        base_selected=start.num_selected,
        steps=tuple(tally.report(step.name, known, step.facts()) for step, tally, known in told),
        **mask.header.model_dump(include=set(MaskReport.model_fields)),
    )
    atomic_write(report_path(prefix, name), report.model_dump_json(indent=2).encode() + b"\n")
    mask.save(part_path(prefix, f".{name}"))
    return report


def report_path(prefix: Path, name: str) -> Path:
    """Where the report of a mask stands."""
    return part_path(prefix, f".{name}.report.json")


def _check(prefix: str | Path, *, name: str, base: str, steps: Sequence[Step]) -> Path:
    """Path of a local dataset. Raises: ValueError if an argument cannot be used."""
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(
            f"mask {name!r}: a name is a lower-case letter, then letters, digits, _ and -, and "
            f"none of {', '.join(RESERVED)}; choose another"
        )
    if not _NAME.fullmatch(base):
        raise ValueError(f"base {base!r} is no name of a mask; give PREFIX.NAME's NAME")
    if base == name:
        raise ValueError(f"mask {name!r} cannot be its own base; choose another name")
    if not steps:
        raise ValueError(f"mask {name!r}: no step is given, so it would equal its base {base!r}")
    if is_url(prefix):
        raise ValueError(
            f"{prefix} is in an object store; a mask is written beside a local dataset: copy the "
            "dataset here, then copy the mask there"
        )
    return Path(prefix)


def _load_base(prefix: Path, base: str, dataset: IndexedDataset) -> DocumentMask:
    """Raises: ValueError if the mask is missing, damaged or of another dataset."""
    path = part_path(prefix, f".{base}")
    mask = load_mask(path)
    expected = (dataset.num_documents, dataset.manifest.idx_xxh3_128)
    if (mask.header.documents, mask.header.idx_xxh3_128) != expected:
        raise ValueError(
            f"{path} is a mask of {mask.header.documents} documents of the index "
            f"{mask.header.idx_xxh3_128[:12]}, but {prefix}.idx has {expected[0]} and digest "
            f"{expected[1][:12]}; make the mask again for this dataset"
        )
    return mask


def _rule(
    base: str, mask: DocumentMask, steps: Sequence[Step], settings: Sequence[dict[str, Any]]
) -> str:
    """How the documents are chosen, as JSON. Raises: ValueError if no header could hold it."""
    header = mask.header
    facts: dict[str, Any] = {"mask": base, "payload_xxh3_128": header.payload_xxh3_128}
    if header.rule:
        facts["rule"] = _parsed(header.rule)
    told = [{"step": s.name, **known} for s, known in zip(steps, settings, strict=True)]
    rule = json.dumps({"base": facts, "steps": told}, ensure_ascii=False)
    if len(rule.encode()) > _MAX_RULE:
        raise ValueError(
            f"the steps' settings take {len(rule.encode())} bytes, but a mask's header holds "
            f"{_MAX_RULE}; give fewer files, or join them"
        )
    return rule


def _parsed(rule: str) -> Any:
    """A rule that `write_mask` wrote as JSON, any other as its text."""
    try:
        return json.loads(rule)
    except ValueError:
        return rule


def _objected(batch: Batch, steps: Sequence[Step], tallies: Sequence[StepTally]) -> np.ndarray:
    """int64[m]: documents of a batch that leave, each at the first step that objects to it."""
    out = [np.empty(0, np.int64)]
    for step, tally in zip(steps, tallies, strict=True):
        if not len(batch):
            break
        objections = step.objections(batch)
        tally.add(batch, objections)
        leaves = np.array([bool(found) for found in objections])
        out.append(batch.numbers[leaves])
        batch = batch.part(~leaves)
    return np.concatenate(out)
