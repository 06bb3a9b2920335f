"""Give an existing Megatron `.bin/.idx` the parts that a dataset of ours has beside them.

One pass over `.bin`, which stays as it is. Where the documents came from is not known: their
provenance has source -1, record -1 and no digest of the text.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_sip.data.document_mask import mask_of_bits
from megatron_sip.data.maintenance.layout import Layout, eligible_bits, first_problem, open_layout
from megatron_sip.data.maintenance.output_folder import output_folder
from megatron_sip.data.maintenance.pieces import id_problem, read_pieces
from megatron_sip.data.maintenance.progress import Watch, unwatched
from megatron_sip.data.maintenance.published import local_prefix
from megatron_sip.data.manifest import Manifest, file_digest, part_path
from megatron_sip.data.provenance import schema_of, write_parquet
from megatron_sip.data.staged_dataset import provenance_of
from megatron_sip.data.storage import LocalBytes, open_bytes
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.publish import sync

_MADE = (".documents.parquet", ".eligible", ".manifest.json")  # in the order of publication
_MEGATRON_NAMES = ("_text_document", "_text_sentence")  # what its preprocessing appends
_REMEDY = "the file is damaged or was made by another program; make it again"


@dataclass(frozen=True)
class _Scan:
    """What the pass over `.bin` found. Args: digest: of the file. ended: documents that end with
    the eod. unended: the first that does not, -1: none."""

    digest: str
    ended: int
    unended: int


def find_prefix(prefix: str | Path) -> Path:
    """PREFIX if PREFIX.idx exists, else the one of PREFIX_text_document and PREFIX_text_sentence.

    Raises: ValueError if there is none, or both.
    """
    prefix = local_prefix(prefix)
    if part_path(prefix, ".idx").is_file():
        return prefix
    candidates = [prefix.with_name(prefix.name + name) for name in _MEGATRON_NAMES]
    found = [c for c in candidates if part_path(c, ".idx").is_file()]
    if len(found) != 1:
        names = ", ".join(f"{p}.idx" for p in (found or [prefix, *candidates]))
        reason = "both exist; give the whole prefix" if found else "none of them exists"
        raise ValueError(f"{prefix}: {names}: {reason}")
    return found[0]


def adopt(
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    min_tokens: int,
    vocab_size: int | None = None,
    watch: Watch = unwatched,
) -> Manifest:
    """Write PREFIX.documents.parquet, PREFIX.eligible and, last, PREFIX.manifest.json.

    Args:    prefix: path without `.idx`, as `find_prefix` takes it. tokenizer: that the data was
             made with. min_tokens: documents with at least so many, without their end-of-document
             id, are eligible. vocab_size: ids are below it; None: the tokenizer's. It may be
             padded, but no id may lie in the padding: no text and no row of the model is there.
             watch: told of the progress.
    Returns: the manifest; its vocab_size is the tokenizer's, below which every id was found.
    Raises:  ValueError if the dataset has a manifest already, its index cannot be true, an id is
             out of range, or some documents end with the tokenizer's eod and others do not. Then
             nothing is written.
    """
    prefix = find_prefix(prefix)
    if part_path(prefix, ".manifest.json").exists():
        raise ValueError(
            f"{prefix}.manifest.json exists: this is a dataset of ours already; check it with "
            f"tools/dataset.py verify {prefix}"
        )
    vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if not tokenizer.eod < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the tokenizer's end-of-document id is "
            f"{tokenizer.eod}; give a vocabulary that holds it"
        )
    if min_tokens < 0:
        raise ValueError(f"min_tokens is {min_tokens}, but must be 0 or more")
    with closing(open_bytes(prefix)) as data, output_folder(prefix) as folder:
        assert isinstance(data, LocalBytes)  # `find_prefix` takes no URL
        layout = _checked_layout(prefix, data)
        scan = _scan(layout, data, tokenizer, vocab_size, folder / "documents.arrows", watch)
        manifest = _stage(folder, layout, scan, tokenizer, min_tokens)
        for suffix in _MADE:
            (folder / f"dataset{suffix}").replace(part_path(prefix, suffix))
        sync(prefix.parent)
    return manifest


def _checked_layout(prefix: Path, data: LocalBytes) -> Layout:
    """Index and size of `.bin`. Raises: ValueError naming the first wrong document."""
    layout = open_layout(part_path(prefix, ".idx"))
    if not layout.documents:
        raise ValueError(f"{layout.path} has no document; there is nothing to adopt")
    problem = first_problem(layout)
    if problem is not None:
        raise ValueError(f"{layout.path}: document {problem.document} {problem.text}; {_REMEDY}")
    if data.size != layout.end:
        raise ValueError(
            f"{data.name} has {data.size} bytes, but the documents of {layout.path} end at byte "
            f"{layout.end}; {_REMEDY}"
        )
    return layout


def _scan(
    layout: Layout,
    data: LocalBytes,
    tokenizer: Tokenizer,
    vocab_size: int,
    stream: Path,
    watch: Watch,
) -> _Scan:
    """Check every token, write the provenance stream."""
    size = min(vocab_size, tokenizer.vocab_size)
    digest, ended, unended = xxhash.xxh3_128(), 0, -1
    with open(stream, "wb") as output:
        output.write(schema_of().serialize())
        for piece in read_pieces(layout, data, first=0, last=layout.documents):
            problem = id_problem(piece, vocab_size=size)
            if problem is not None:
                raise ValueError(
                    f"{data.name}: document {problem.document} {problem.text}; "
                    + _id_remedy(vocab_size, tokenizer.vocab_size)
                )
            tokens = piece.tokens.view(np.uint8).data
            digest.update(tokens)
            rows = provenance_of(tokens, piece.lengths, dtype=layout.header.dtype)
            output.write(rows.serialize())
            ends = piece.last_tokens == tokenizer.eod
            ended += int(ends.sum())
            if unended < 0 and not ends.all():
                unended = piece.first + int(np.argmin(ends))
            watch(piece.first + len(piece.lengths), piece.end, layout.end)
    if 0 < ended < layout.documents:
        start, end = (int(edge[0]) for edge in layout.spans(unended, unended + 1))
        raise ValueError(
            f"{data.name}: {ended} of {layout.documents} documents end with the end-of-document id "
            f"{tokenizer.eod}, the first that does not is document {unended} (bytes {start}:{end});"
            " all must, or none; give the tokenizer that the data was made with, or make it again"
        )
    return _Scan(digest.hexdigest(), ended, unended)


def _id_remedy(given: int, of_tokenizer: int) -> str:
    """What to do about an id that is not below both sizes of the vocabulary."""
    if given < of_tokenizer:
        return f"--vocab-size is {given}, the tokenizer has {of_tokenizer} ids; leave it out"
    padding = f"no text has an id from {of_tokenizer} on, --vocab-size {given} only pads; "
    return (
        f"{padding if given > of_tokenizer else ''}give the tokenizer that the data was made with"
    )


def _stage(
    folder: Path,
    layout: Layout,
    scan: _Scan,
    tokenizer: Tokenizer,
    min_tokens: int,
) -> Manifest:
    """The new parts in the working folder, on the disk."""
    append_eod = scan.ended > 0
    index_digest = file_digest(layout.path)
    write_parquet(
        folder / "documents.arrows", folder / "dataset.documents.parquet", schema=schema_of()
    )
    mask_of_bits(
        eligible_bits(layout, shortest=min_tokens + int(append_eod)),
        documents=layout.documents,
        min_tokens=min_tokens,
        idx_xxh3_128=index_digest,
    ).save(folder / "dataset.eligible")
    manifest = Manifest(
        made_by="adopt",
        split="",
        split_shares="",
        split_salt="",
        documents=layout.documents,
        tokens=layout.end // layout.itemsize,
        dtype="uint16" if layout.header.dtype == np.uint16 else "int32",
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=append_eod,
        bad_records=0,
        idx_bytes=layout.header.bytes,
        idx_xxh3_128=index_digest,
        bin_bytes=layout.end,
        bin_xxh3_128=scan.digest,
        sources=(),
    )
    text = manifest.model_dump_json(indent=2) + "\n"
    (folder / "dataset.manifest.json").write_text(text, encoding="utf-8")
    for suffix in _MADE:
        sync(folder / f"dataset{suffix}")
    return manifest
