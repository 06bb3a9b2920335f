"""One dataset into several by a hash of each document's tokens.

The same document goes to the same split wherever it stands, so exact duplicates stay together.
Splits made by `tools/preprocess_data.py` hash the text: they are others, even with one salt.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from contextlib import ExitStack, closing
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_sip.data.maintenance.output_folder import output_folder, refuse_existing
from megatron_sip.data.maintenance.progress import Watch, unwatched
from megatron_sip.data.maintenance.published import Published, local_prefix, open_published
from megatron_sip.data.manifest import Manifest
from megatron_sip.data.splits import Split
from megatron_sip.data.staged_dataset import StagedDataset


def split(
    prefix: str | Path, output_prefix: Path, split: Split, *, watch: Watch = unwatched
) -> dict[str, Manifest]:
    """Write OUTPUT_NAME.* for each name of the split; documents keep their order.

    Every document is in exactly one of them, with its row of the provenance. Each manifest lists
    all sources, so that a row's source stays what it was. As after `merge`, a document has one
    sequence.

    Args:    prefix: dataset. output_prefix: OUTPUT; no OUTPUT_NAME may exist. split: names, shares
             and salt. watch: told of the progress.
    Returns: manifest by name.
    Raises:  ValueError if the dataset is damaged, an output exists, or a split gets no document.
             Then nothing is written.
    """
    dataset, output = open_published(prefix), local_prefix(output_prefix)
    outputs = {name: output.with_name(f"{output.name}_{name}") for name in split.names}
    for path in outputs.values():
        refuse_existing(path)
    facts = dataset.manifest
    with output_folder(output) as folder, ExitStack() as stack:
        staged = [
            stack.enter_context(
                closing(
                    StagedDataset(
                        folder / name,
                        prefix=path,
                        vocab_size=facts.vocab_size,
                        kept=dataset.kept,
                        dtype=np.dtype(facts.dtype),
                    )
                )
            )
            for name, path in outputs.items()
        ]
        _part(dataset, staged, split, watch)
        manifests = {}
        for name, part in zip(split.names, staged, strict=True):
            if not part.documents:
                raise ValueError(
                    f"split {name!r} gets none of the {facts.documents} documents of {prefix}; "
                    "give it a larger share, another salt, or leave it out"
                )
            manifests[name] = part.stage(
                min_tokens=dataset.min_tokens,
                append_eod=facts.append_eod,
                made_by="split",
                split=name,
                split_shares=str(split),
                split_salt=split.salt,
                tokenizer_digest=facts.tokenizer_digest,
                eod=facts.eod,
                bad_records=facts.bad_records,
                sources=facts.sources,
            )
        for part in staged:
            part.publish()
    return manifests


def splits_of(digests: np.ndarray, split: Split) -> np.ndarray:
    """Which split each document belongs to.

    Args:    digests: uint64[n], tokens_xxh3_64 of each.
    Returns: int64[n], index into `split.names`; i with probability share i / sum of shares.
    """
    key = hashlib.blake2b(split.salt.encode(), digest_size=32).digest()
    ends = list(accumulate(split.shares))
    found = np.empty(len(digests), np.int64)
    for i, digest in enumerate(digests.tolist()):
        mixed = hashlib.blake2b(digest.to_bytes(8, "little"), digest_size=8, key=key).digest()
        found[i] = bisect_right(ends, int.from_bytes(mixed, "little") * ends[-1] >> 64)
    return found


def _part(dataset: Published, staged: list[StagedDataset], split: Split, watch: Watch) -> None:
    """Each document to its split."""
    for piece, rows in dataset.documents():
        chosen = splits_of(rows.column("tokens_xxh3_64").to_numpy(), split)
        for i, part in enumerate(staged):
            mine = chosen == i
            if mine.any():
                tokens = piece.tokens[np.repeat(mine, piece.lengths)]
                part.append(tokens.view(np.uint8).data, rows.filter(pa.array(mine)))
        done = piece.first + len(piece.lengths)
        watch(done, piece.end, dataset.manifest.bin_bytes)
