"""Read a dataset whole and name the first broken document.

Against the manifest: digests of `.idx` and `.bin`. Against the provenance: place, length and digest
of each document. Then the masks, see `verify_masks`. What no digest guards is not seen: the
manifest itself, and in the provenance `record`, `text_xxh3_64` and the kept columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from megatron_sip.data.indexed_files import HEADER, check_tokenizer
from megatron_sip.data.maintenance.layout import Layout, Problem, first_problem, open_layout
from megatron_sip.data.maintenance.pieces import Piece, id_problem, read_pieces
from megatron_sip.data.maintenance.progress import Watch, unwatched
from megatron_sip.data.maintenance.published import local_prefix, piece_digests
from megatron_sip.data.maintenance.rows import find_row, read_rows
from megatron_sip.data.maintenance.verify_masks import verify_masks
from megatron_sip.data.manifest import Manifest, file_digest, load_manifest, part_path
from megatron_sip.data.storage import LocalBytes, open_bytes
from megatron_sip.data.tokenizer import Tokenizer

_REMEDY = "restore the file, or make the dataset again with tools/preprocess_data.py"


@dataclass(frozen=True)
class VerifyReport:
    """What was found whole.

    Args: prefix: dataset. documents, tokens, bin_bytes: in it. eligible: documents of
          PREFIX.eligible. masks: names of the other masks beside it. tokenizer_checked: the ids
          were checked against a tokenizer too.
    """

    prefix: Path
    documents: int
    tokens: int
    bin_bytes: int
    eligible: int
    masks: tuple[str, ...]
    tokenizer_checked: bool


def verify(
    prefix: str | Path, tokenizer: Tokenizer | None, *, watch: Watch = unwatched
) -> VerifyReport:
    """Check every byte of a dataset that something tells of.

    The parts are checked in the order .idx, .bin with the provenance, masks; within a part the
    first broken document is named, with its bytes in `.bin` and, if known, its source and line.

    Args:    prefix: path without `.bin`. tokenizer: if given, it must be that of the dataset.
             watch: told of the progress.
    Returns: what was checked.
    Raises:  ValueError naming file, document and what is wrong.
    """
    prefix = local_prefix(prefix)
    case = _Case(prefix, load_manifest(part_path(prefix, ".manifest.json")))
    if tokenizer is not None:
        case.check_tokenizer(tokenizer)
    layout = _check_index(case)
    vocab_size = case.manifest.vocab_size
    if tokenizer is not None:
        vocab_size = min(vocab_size, tokenizer.vocab_size)
    _check_tokens(case, layout, vocab_size, watch)
    eligible, masks = verify_masks(prefix, case.manifest, layout)
    return VerifyReport(
        prefix,
        layout.documents,
        case.manifest.tokens,
        layout.end,
        eligible,
        masks,
        tokenizer is not None,
    )


@dataclass(frozen=True)
class _Case:
    """A dataset under examination."""

    prefix: Path
    manifest: Manifest

    def part(self, suffix: str) -> Path:
        return part_path(self.prefix, suffix)

    def broken(
        self, path: Path, problem: Problem, span: tuple[int, int] | None = None
    ) -> ValueError:
        """The error that tells of a document. Args: span: its bytes; None: as its row says."""
        row = find_row(
            self.part(".documents.parquet"), problem.document, documents=self.manifest.documents
        )
        itemsize = np.dtype(self.manifest.dtype).itemsize
        if span is None and row is not None:
            span = row.start * itemsize, (row.start + row.tokens) * itemsize
        known = [f"bytes {span[0]}:{span[1]} of {self.prefix.name}.bin"] if span else []
        place = row.place(self.manifest.sources) if row else ""
        known += [f"from {place}"] if place else []
        where = f" ({', '.join(known)})" if known else ""
        return ValueError(f"{path}: document {problem.document}{where} {problem.text}; {_REMEDY}")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises: ValueError if it is not the one that the data was made with."""
        given = Path("the one that was given")
        check_tokenizer(self.prefix, self.manifest, digest=tokenizer.digest, path=given)
        if tokenizer.eod != self.manifest.eod:
            raise ValueError(
                f"{self.prefix}: eod is {self.manifest.eod} in the manifest, but {tokenizer.eod} "
                "in the tokenizer; give the tokenizer_config.json that was beside it, too"
            )


def _check_index(case: _Case) -> Layout:
    """The index, which agrees with the manifest. Raises: ValueError if it does not."""
    path, manifest = case.part(".idx"), case.manifest
    _check_index_size(case)
    layout = open_layout(path)
    found = (layout.documents, layout.header.dtype.name)
    if found != (manifest.documents, manifest.dtype):
        raise ValueError(
            f"{path}: the header says {found[0]} documents of {found[1]}, but the manifest "
            f"{manifest.documents} of {manifest.dtype}; {_REMEDY}"
        )
    problem = first_problem(layout)
    if problem is None and layout.end != manifest.bin_bytes:
        text = f"is the last and ends at byte {layout.end}, but must at {manifest.bin_bytes}"
        problem = Problem(layout.documents - 1, text)
    if file_digest(path) != manifest.idx_xxh3_128:
        limit = problem.document if problem else layout.documents
        problem = _first_difference(case, layout, limit) or problem
        if problem is None:
            raise ValueError(
                f"{path} has another digest than its manifest says, but of no document can be seen "
                f"that it lies elsewhere than it must; {_REMEDY}"
            )
    if problem is not None:
        raise case.broken(path, problem)
    if manifest.tokens * layout.itemsize != layout.end:
        raise ValueError(
            f"{path}: the documents end at byte {layout.end}, but the manifest says "
            f"{manifest.tokens} tokens of {manifest.dtype}; {_REMEDY}"
        )
    return layout


def _check_index_size(case: _Case) -> None:
    """Raises: ValueError if the `.idx` is missing or longer, or shorter: then with the first
    document whose border is lost, which stands at the end of the file."""
    path, expected = case.part(".idx"), case.manifest.idx_bytes
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None
    if size < expected:
        borders = expected - 8 * (case.manifest.documents + 1)
        whole = max(0, size - max(borders, HEADER.size)) // 8
        text = f"is the first that cannot be found: the file has {size} of {expected} bytes"
        raise case.broken(path, Problem(max(0, whole - 1), text))
    if size > expected:
        raise ValueError(
            f"{path} has {size} bytes, {size - expected} more than its manifest says; {_REMEDY}"
        )


def _first_difference(case: _Case, layout: Layout, limit: int) -> Problem | None:
    """The first of `limit` documents that lies elsewhere than the provenance says."""
    first = end = 0
    try:
        for lengths in _row_lengths(case):
            lengths = lengths[: limit - first]
            if not len(lengths):
                break
            ends = end + np.cumsum(lengths) * layout.itemsize
            found_starts, found_ends = layout.spans(first, first + len(lengths))
            bad = (found_ends != ends) | (found_starts != ends - lengths * layout.itemsize)
            if bad.any():
                i = int(np.argmax(bad))
                text = f"lies at bytes {found_starts[i]}:{found_ends[i]} by the altered index"
                return Problem(first + i, text)
            first, end = first + len(lengths), int(ends[-1])
    except ValueError:
        pass  # the provenance is broken as well; the index is told of first
    return None


def _row_lengths(case: _Case) -> Iterator[np.ndarray]:
    rows = read_rows(case.part(".documents.parquet"), documents=case.manifest.documents)
    return (batch.column("tokens").to_numpy().astype(np.int64) for batch in rows)


def _check_tokens(case: _Case, layout: Layout, vocab_size: int, watch: Watch) -> None:
    """Every document of `.bin` and its row. Raises: ValueError naming the first broken one."""
    path, table = case.part(".bin"), case.part(".documents.parquet")
    digest, first = xxhash.xxh3_128(), 0
    with closing(open_bytes(case.prefix)) as data:
        assert isinstance(data, LocalBytes)
        whole = _whole_documents(layout, data.size)
        for rows in read_rows(table, documents=layout.documents):
            last = first + len(rows)
            row_problem = _row_problem(rows, layout.lengths(first, last), first, case.manifest)
            limit = min(last, whole, row_problem.document if row_problem else last)
            for piece in read_pieces(layout, data, first=first, last=limit):
                digests = rows.column("tokens_xxh3_64").to_numpy()[piece.first - first :]
                problem = _piece_problem(case, piece, digests, vocab_size)
                if problem is not None:
                    raise problem
                digest.update(piece.tokens.view(np.uint8).data)
                watch(piece.first + len(piece.lengths), piece.end, layout.end)
            if limit == whole < last:
                text = f"is the first that is not whole: the file has {data.size} bytes"
                raise case.broken(path, Problem(whole, text), _span(layout, whole))
            if row_problem is not None:
                raise case.broken(table, row_problem, _span(layout, row_problem.document))
            first = last
        if data.size != layout.end:
            raise ValueError(
                f"{path} has {data.size} bytes, {data.size - layout.end} more than its documents; "
                f"{_REMEDY}"
            )
    if digest.hexdigest() != case.manifest.bin_xxh3_128:
        raise ValueError(
            f"{path} has another digest than its manifest says, but each document agrees with "
            f"{table.name}: both were altered, or the manifest was; {_REMEDY}"
        )


def _whole_documents(layout: Layout, size: int) -> int:
    """How many documents end within the first `size` bytes."""
    low, high = 0, layout.documents
    while low < high:
        middle = (low + high) // 2
        if _span(layout, middle)[1] <= size:
            low = middle + 1
        else:
            high = middle
    return low


def _span(layout: Layout, document: int) -> tuple[int, int]:
    starts, ends = layout.spans(document, document + 1)
    return int(starts[0]), int(ends[0])


def _row_problem(
    rows: pa.RecordBatch, lengths: np.ndarray, first: int, manifest: Manifest
) -> Problem | None:
    """The first row that cannot be its document's."""
    tokens, source = (rows.column(name).to_numpy() for name in ("tokens", "source"))
    bad = (tokens != lengths) | (source < -1) | (source >= len(manifest.sources))
    if not bad.any():
        return None
    i = int(np.argmax(bad))
    text = (
        f"has {lengths[i]} tokens, but its row says {tokens[i]}"
        if tokens[i] != lengths[i]
        else f"has source {source[i]} in its row, but there are {len(manifest.sources)}"
    )
    return Problem(first + i, text)


def _piece_problem(
    case: _Case, piece: Piece, digests: np.ndarray, vocab_size: int
) -> ValueError | None:
    """What is wrong with the first broken document of a piece. Args: digests: of at least its
    documents, as the provenance says."""
    manifest, path = case.manifest, case.part(".bin")
    problems = []
    differs = piece_digests(piece) != digests[: len(piece.lengths)]
    if differs.any():
        text = "differs from the digest in its row"
        problems.append(Problem(piece.first + int(np.argmax(differs)), text))
    if (in_ids := id_problem(piece, vocab_size=vocab_size)) is not None:
        problems.append(in_ids)
    if manifest.append_eod and (piece.last_tokens != manifest.eod).any():
        i = int(np.argmax(piece.last_tokens != manifest.eod))
        text = f"ends with token id {piece.last_tokens[i]}, but must with eod {manifest.eod}"
        problems.append(Problem(piece.first + i, text))
    if not problems:
        return None
    problem = min(problems, key=lambda p: p.document)  # the digest first, of the same document
    i = problem.document - piece.first
    start = piece.start + int(piece.lengths[:i].sum()) * piece.tokens.itemsize
    span = start, start + int(piece.lengths[i]) * piece.tokens.itemsize
    if differs[i] and file_digest(path) == manifest.bin_xxh3_128:
        path = case.part(".documents.parquet")  # the tokens are those that were written
    return case.broken(path, problem, span)
