"""The masks beside a dataset: PREFIX.eligible, which can be made again, and others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_sip.data.document_mask import (
    DocumentMask,
    MaskHeader,
    load_header,
    load_mask,
    mask_of_bits,
)
from megatron_sip.data.maintenance.layout import Layout, eligible_bits
from megatron_sip.data.manifest import PARTS, Manifest, part_path

_MAGIC = b"SIPMASK1"
_REMEDY = "make the dataset again, or the mask with tools/dataset.py mask"


def verify_masks(prefix: Path, manifest: Manifest, layout: Layout) -> tuple[int, tuple[str, ...]]:
    """Check PREFIX.eligible bit by bit, and each other mask PREFIX.* as far as one can.

    Args:    layout: an index that agrees with the manifest.
    Returns: (eligible documents, names of the other masks).
    Raises:  ValueError naming the file, and the first document that is wrongly in it or out of it.
    """
    eligible = _verify_eligible(part_path(prefix, ".eligible"), manifest, layout)
    others = other_masks(prefix)
    for path in others:
        _verify_other(path, manifest, layout)
    return eligible, tuple(path.name for path in others)


def other_masks(prefix: Path) -> list[Path]:
    """Masks of a dataset beside its eligible documents, sorted.

    Files of a dataset whose prefix begins with this one and a dot are not of this one.
    """
    folder, start = prefix.parent, f"{prefix.name}."
    names = [path.name for path in folder.iterdir() if path.name.startswith(start)]
    ending = ".manifest.json"
    longer = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    foreign = tuple(f"{name}." for name in longer if name != prefix.name)
    own = {start + suffix.removeprefix(".") for suffix in PARTS}
    candidates = (
        folder / name for name in names if name not in own and not name.startswith(foreign)
    )
    return sorted(path for path in candidates if path.is_file() and _is_mask(path))


def _is_mask(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def _verify_eligible(path: Path, manifest: Manifest, layout: Layout) -> int:
    header = load_header(path)
    _check_owner(path, header, manifest)
    shortest = header.min_tokens + int(manifest.append_eod)
    expected = mask_of_bits(
        eligible_bits(layout, shortest=shortest),
        documents=layout.documents,
        min_tokens=header.min_tokens,
    )
    words = expected.words
    start = path.stat().st_size - words.nbytes
    found = np.memmap(path, "<u8", mode="r", offset=start, shape=words.shape)
    different = np.flatnonzero(found != words)
    if different.size:
        word = int(different[0])
        wrong = int(found[word]) ^ int(words[word])
        bit = (wrong & -wrong).bit_length() - 1
        document = 64 * word + bit
        if document >= layout.documents:
            raise ValueError(f"{path}: bits behind the last document are set; {_REMEDY}")
        length = int(layout.lengths(document, document + 1)[0])
        is_in = "is in the mask" if int(found[word]) >> bit & 1 else "is not in the mask"
        raise ValueError(
            f"{path}: document {document} of {length} tokens {is_in}, against its rule of "
            f"{shortest} or more{' with the eod' if manifest.append_eod else ''}; {_REMEDY}"
        )
    _check_sums(path, load_mask(path), expected)
    return header.selected


def _verify_other(path: Path, manifest: Manifest, layout: Layout) -> None:
    mask = load_mask(path)
    _check_owner(path, mask.header, manifest)
    bits = np.asarray(mask.words).view(np.uint8)[: -(-layout.documents // 8)]
    expected = mask_of_bits(bits, documents=layout.documents, min_tokens=mask.header.min_tokens)
    _check_sums(path, mask, expected)
    shortest = mask.header.min_tokens + int(manifest.append_eod)
    short = bits & ~eligible_bits(layout, shortest=shortest)
    if short.any():
        byte = int(np.argmax(short != 0))
        document = 8 * byte + int(np.argmax(np.unpackbits(short[byte], bitorder="little")))
        length = int(layout.lengths(document, document + 1)[0])
        raise ValueError(
            f"{path}: document {document} of {length} tokens is in the mask, whose documents have "
            f"{shortest} or more{' with the eod' if manifest.append_eod else ''}; {_REMEDY}"
        )


def _check_owner(path: Path, header: MaskHeader, manifest: Manifest) -> None:
    """Raises: ValueError if the mask is not of this dataset."""
    if (header.documents, header.idx_xxh3_128) != (manifest.documents, manifest.idx_xxh3_128):
        raise ValueError(
            f"{path} is a mask of {header.documents} documents of the index with digest "
            f"{header.idx_xxh3_128 or 'unknown'}, but here are {manifest.documents} with "
            f"{manifest.idx_xxh3_128}; {_REMEDY}"
        )


def _check_sums(path: Path, mask: DocumentMask, expected: DocumentMask) -> None:
    """Raises: ValueError if directory or count of the mask are not those of its bits."""
    if (
        mask.header.payload_xxh3_128 != expected.header.payload_xxh3_128
        or mask.header.selected != expected.header.selected
    ):
        raise ValueError(
            f"{path}: its header says {mask.header.selected} documents, its bits "
            f"{expected.header.selected}, or its rank directory disagrees; {_REMEDY}"
        )
