"""Facts about a dataset, from its small parts: `.bin` is read for the samples alone.

Memory: four bytes a document.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sip.data.document_mask import load_header
from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.indexed_files import check_files
from megatron_sip.data.maintenance.layout import Layout, open_layout
from megatron_sip.data.maintenance.rows import kept_columns, read_rows
from megatron_sip.data.manifest import PARTS, Manifest
from megatron_sip.data.storage import local_part
from megatron_sip.data.tokenizer import Tokenizer

PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_MAX_BINS = 64


@dataclass(frozen=True)
class SourceFacts:
    """One input file. Args: path: empty for documents of unknown source. bytes: of the file.
    documents, tokens: of it in this dataset."""

    path: str
    bytes: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Bin:
    """Documents of low or more, but fewer than high tokens. Args: documents, tokens: in all."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Sample:
    """A document as text. Args: document: its number. tokens: of all of it. text: of its first
    tokens. whole: that is all of them."""

    document: int
    tokens: int
    text: str
    whole: bool


@dataclass(frozen=True)
class Facts:
    """What a dataset holds; lengths are in tokens, the end-of-document id included.

    Args: prefix: as given. manifest: what it was made of, its sources left out. data_digest: name
          of the data. sequences: in the index; more than documents if Megatron split sentences.
          bytes: of each part, by suffix. min_tokens, eligible: documents with at least so many,
          the end-of-document id not counted. shortest, longest, mean: of the lengths.
          percentiles: {percent: length}, interpolated. histogram: bins [2^k, 2^(k+1)), from the
          shortest document's to the longest's. sources: with documents in it, in the manifest's
          order, unknown ones last. kept: columns of the provenance beside the fixed ones.
          samples: documents chosen by a seed.
    """

    prefix: str
    manifest: Manifest
    data_digest: str
    sequences: int
    bytes: dict[str, int]
    min_tokens: int
    eligible: int
    shortest: int
    longest: int
    mean: float
    percentiles: dict[int, float]
    histogram: tuple[Bin, ...]
    sources: tuple[SourceFacts, ...]
    kept: tuple[str, ...]
    samples: tuple[Sample, ...]


def inspect(
    prefix: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    num_samples: int = 0,
    sample_tokens: int = 200,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> Facts:
    """Look at a dataset.

    Args:    prefix: path or URL without `.bin`. tokenizer: decodes the samples. num_samples:
             documents to show, at most all. sample_tokens: shown of each. seed: chooses them.
             cache_dir: folder for the small parts of a URL's dataset.
    Returns: its facts.
    Raises:  ValueError if a part is missing, truncated or altered, if samples are asked for without
             a tokenizer, or the tokenizer is another one.
    """
    if num_samples and tokenizer is None:
        raise ValueError(
            f"{prefix}: {num_samples} samples need the tokenizer of the dataset; give --tokenizer"
        )
    if num_samples < 0 or sample_tokens < 1:
        raise ValueError(
            f"{num_samples} samples of {sample_tokens} tokens: there must be 0 or more of 1 or more"
        )
    manifest = check_files(prefix, cache_dir=cache_dir)
    paths = {s: local_part(prefix, s, cache_dir=cache_dir) for s in PARTS if s != ".bin"}
    layout = open_layout(paths[".idx"])
    lengths = _lengths(layout)
    header = load_header(paths[".eligible"])
    provenance = paths[".documents.parquet"]
    histogram = _histogram(lengths)
    at = np.percentile(lengths, PERCENTS, overwrite_input=True).tolist()
    return Facts(
        prefix=str(prefix),
        manifest=manifest.model_copy(update={"sources": ()}),
        data_digest=manifest.data_digest,
        sequences=layout.header.sequences,
        bytes={".bin": manifest.bin_bytes} | {s: p.stat().st_size for s, p in paths.items()},
        min_tokens=header.min_tokens,
        eligible=header.selected,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=manifest.tokens / manifest.documents,
        percentiles=dict(zip(PERCENTS, at, strict=True)),
        histogram=histogram,
        sources=_sources(provenance, manifest),
        kept=kept_columns(provenance),
        samples=_samples(prefix, tokenizer, num_samples, sample_tokens, seed, cache_dir)
        if tokenizer is not None
        else (),
    )


def _lengths(layout: Layout) -> np.ndarray:
    """int32[documents]."""
    lengths = np.empty(layout.documents, np.int32)
    for first, last in layout.chunks():
        lengths[first:last] = layout.lengths(first, last)
    if not lengths.size or lengths.min() < 1:
        raise ValueError(f"{layout.path}: there is no document, or one is empty; see verify")
    return lengths


def _histogram(lengths: np.ndarray) -> tuple[Bin, ...]:
    """Bins [2^k, 2^(k+1)) from the first to the last that is not empty."""
    documents, tokens = np.zeros(_MAX_BINS, np.int64), np.zeros(_MAX_BINS, np.int64)
    for first in range(0, len(lengths), 1 << 20):
        part = lengths[first : first + (1 << 20)]
        exponents = np.frexp(part.astype(np.float64))[1] - 1  # exact: lengths are below 2^31
        documents += np.bincount(exponents, minlength=_MAX_BINS)
        np.add.at(tokens, exponents, part)
    filled = np.flatnonzero(documents)
    return tuple(
        Bin(1 << k, 2 << k, int(documents[k]), int(tokens[k]))
        for k in range(int(filled[0]), int(filled[-1]) + 1)
    )


def _sources(path: Path, manifest: Manifest) -> tuple[SourceFacts, ...]:
    """Documents and tokens of each source that has some."""
    count = len(manifest.sources) + 1  # the last: unknown
    documents, tokens = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for rows in read_rows(path, documents=manifest.documents):
        source = rows.column("source").to_numpy()
        if source.min() < -1 or source.max() >= count - 1:
            raise ValueError(
                f"{path}: sources {source.min()}..{source.max()} must lie in [-1, {count - 1}); "
                "the file was altered; see tools/dataset.py verify"
            )
        documents += np.bincount(source % count, minlength=count)  # -1 becomes the last
        np.add.at(tokens, source % count, rows.column("tokens").to_numpy())
    known = [(s.path, s.bytes) for s in manifest.sources] + [("", 0)]
    return tuple(
        SourceFacts(name, size, int(documents[i]), int(tokens[i]))
        for i, (name, size) in enumerate(known)
        if documents[i]
    )


def _samples(
    prefix: str | Path,
    tokenizer: Tokenizer,
    num_samples: int,
    sample_tokens: int,
    seed: int,
    cache_dir: Path | None,
) -> tuple[Sample, ...]:
    """Different documents, in their order."""
    samples = []
    with closing(IndexedDataset(prefix, cache_dir=cache_dir)) as dataset:
        dataset.check_tokenizer(tokenizer.digest, path=Path("the one that was given"))
        count = min(num_samples, dataset.num_documents)
        chosen = np.random.default_rng(seed).choice(dataset.num_documents, count, replace=False)
        for i in sorted(chosen.tolist()):
            ids = dataset.document(i)
            text = tokenizer.decode(ids[:sample_tokens])
            samples.append(Sample(i, len(ids), text, len(ids) <= sample_tokens))
    return tuple(samples)
