"""Several datasets into one, in the order given.

`.bin` and `.idx` are byte for byte those of one build of all documents, each of one sequence:
where a document of an adopted dataset had several, their borders are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_sip.data.maintenance.output_folder import output_folder, refuse_existing
from megatron_sip.data.maintenance.progress import Watch, unwatched
from megatron_sip.data.maintenance.published import Published, local_prefix, open_published
from megatron_sip.data.manifest import Manifest
from megatron_sip.data.staged_dataset import StagedDataset

_AGREEING = ("tokenizer_digest", "vocab_size", "eod", "append_eod", "dtype")


def merge(
    prefixes: Sequence[str | Path],
    output: Path,
    *,
    min_tokens: int | None = None,
    watch: Watch = unwatched,
) -> Manifest:
    """Write OUTPUT.* from all documents of some datasets.

    The sources of the inputs stand one after another in the new manifest. Its split is theirs if
    they agree on it, else empty; its bad records are their sum.

    Args:    prefixes: datasets, in the order of their documents. output: prefix, not yet taken.
             min_tokens: of the eligible documents; None: that of the inputs, which must agree.
             watch: told of the progress.
    Returns: the manifest of OUTPUT.
    Raises:  ValueError if the inputs differ in tokenizer, vocabulary, eod, dtype or kept columns,
             naming field and values; if one is damaged, or OUTPUT exists. Then nothing is written.
    """
    output = local_prefix(output)
    if not prefixes:
        raise ValueError(f"{output}: there is no dataset to merge; give one or more prefixes")
    inputs = [open_published(prefix) for prefix in prefixes]
    kept = _agreed(inputs, "kept columns", [list(p.kept) for p in inputs], "build them alike")
    for name in _AGREEING:
        values = [getattr(p.manifest, name) for p in inputs]
        _agreed(inputs, name, values, "make one of them again")
    if min_tokens is None:
        values = [p.min_tokens for p in inputs]
        min_tokens = int(_agreed(inputs, "min_tokens", values, "give the one to use: --min-tokens"))
    if min_tokens < 0:
        raise ValueError(f"min_tokens is {min_tokens}, but must be 0 or more")
    refuse_existing(output)
    first = inputs[0].manifest
    with (
        output_folder(output) as folder,
        closing(
            StagedDataset(
                folder,
                prefix=output,
                vocab_size=first.vocab_size,
                kept=tuple(kept),
                dtype=np.dtype(first.dtype),
            )
        ) as staged,
    ):
        _copy(inputs, staged, watch)
        manifest = staged.stage(
            min_tokens=min_tokens,
            append_eod=first.append_eod,
            made_by="merge",
            tokenizer_digest=first.tokenizer_digest,
            eod=first.eod,
            bad_records=sum(p.manifest.bad_records for p in inputs),
            sources=tuple(source for p in inputs for source in p.manifest.sources),
            **_common_split(inputs),
        )
        staged.publish()
    return manifest


def _copy(inputs: Sequence[Published], staged: StagedDataset, watch: Watch) -> None:
    """All documents in order; a row's source is moved by the sources before its dataset's own."""
    total, done, shift = sum(p.manifest.bin_bytes for p in inputs), 0, 0
    for dataset in inputs:
        for piece, rows in dataset.documents():
            source = rows.column("source").to_numpy()
            moved = pa.array(np.where(source >= 0, source + shift, -1), pa.int32())
            rows = rows.set_column(0, rows.schema.field(0), moved)
            staged.append(piece.tokens.view(np.uint8).data, rows)
            done += piece.tokens.nbytes
            watch(staged.documents, done, total)
        shift += len(dataset.manifest.sources)


def _agreed(inputs: Sequence[Published], name: str, values: Sequence[Any], remedy: str) -> Any:
    """The value that all have. Raises: ValueError naming the first that has another."""
    for dataset, value in zip(inputs, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"merge: {name} is {values[0]!r} in {inputs[0].prefix}, but {value!r} in "
                f"{dataset.prefix}; {remedy}"
            )
    return values[0]


def _common_split(inputs: Sequence[Published]) -> dict[str, str]:
    names = ("split", "split_shares", "split_salt")
    splits = {tuple(getattr(p.manifest, name) for name in names) for p in inputs}
    return dict(zip(names, splits.pop() if len(splits) == 1 else ("", "", ""), strict=True))
