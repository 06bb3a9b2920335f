"""Many indexed datasets as one sequence of documents, with the eligible ones numbered.

At the start only manifests and headers of masks are read, so that 10,000 files are there in a
second; files are opened when they are read, a bounded number at a time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sip.data.document_mask import (
    DocumentMask,
    MaskHeader,
    load_header,
    load_mask,
    mask_of,
)
from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.indexed_files import check_index_digest, check_sizes, check_tokenizer
from megatron_sip.data.manifest import Manifest, load_manifest
from megatron_sip.data.storage import local_part

OPEN_FILES = 64  # datasets of a split, three files each
CHECKED_BYTES = 1 << 26  # of indexes that `check_indexes` reads
_SHARED = ("tokenizer_digest", "vocab_size", "eod", "append_eod")


class Corpus:
    """Documents of datasets of one tokenizer, in the order given.

    A document is eligible if it is in the mask and, without its end-of-document id, has at least
    `min_tokens` tokens. Where the mask was made for fewer tokens, lengths are read at the start.

    Args:   prefixes: of the datasets. mask: name, PREFIX.NAME; "": by length alone.
            cache_dir: for parts of datasets in object stores. max_open: datasets at a time.
    Raises: ValueError naming the file and the remedy if a part is missing, truncated, altered or
            made with another tokenizer than the first, or no document is eligible.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        *,
        min_tokens: int,
        mask: str = "",
        cache_dir: Path | None = None,
        max_open: int = OPEN_FILES,
    ) -> None:
        self.prefixes, self.min_tokens, self.mask = tuple(prefixes), min_tokens, mask
        self._cache_dir, self._max_open = cache_dir, max_open
        self._open: OrderedDict[int, tuple[IndexedDataset, DocumentMask]] = OrderedDict()
        self._made: dict[int, DocumentMask] = {}
        documents, eligible = [0], [0]
        digest, self.tokens = hashlib.sha256(), 0
        first: Manifest | None = None
        for file, prefix in enumerate(self.prefixes):
            manifest = load_manifest(local_part(prefix, ".manifest.json", cache_dir=cache_dir))
            first = first or manifest
            self._check_alike(prefix, manifest, first)
            check_sizes(prefix, manifest, cache_dir=cache_dir)
            header = self._header(file, manifest)
            documents.append(documents[-1] + manifest.documents)
            eligible.append(eligible[-1] + header.selected)
            self.tokens += manifest.tokens
            chosen = header.payload_xxh3_128 if mask else ""
            digest.update(f"{manifest.data_digest} {chosen}\n".encode())
        assert first is not None, "a corpus has at least one dataset"
        self.tokenizer_digest, self.vocab_size = first.tokenizer_digest, first.vocab_size
        self.eod, self.append_eod, self._first = first.eod, first.append_eod, first
        self.digest = digest.hexdigest()[:16] if mask or len(prefixes) > 1 else first.data_digest
        self._documents, self._eligible = np.array(documents), np.array(eligible)
        if not self.num_eligible:
            raise ValueError(
                f"{self.prefixes[0]}{' and others' if len(prefixes) > 1 else ''}: none of "
                f"{self.num_documents} documents"
                f"{f' in mask {mask!r}' if mask else ''} has data.min_prefix_tokens + "
                f"data.suffix_tokens = {min_tokens} tokens; lower these two, or take other "
                "documents"
            )

    @property
    def num_documents(self) -> int:
        """Documents of all datasets."""
        return int(self._documents[-1])

    @property
    def num_eligible(self) -> int:
        """Documents of one pass."""
        return int(self._eligible[-1])

    def eligible_tokens(self) -> int:
        """Tokens of one pass, end-of-document ids included; reads all lengths."""
        files = map(self._file, range(len(self.prefixes)))
        return sum(int(d.document_lengths()[mask.members()].sum()) for d, mask in files)

    def check_tokenizer(self, digest: str, *, path: Path) -> None:
        """Raises: ValueError if the data was made with another tokenizer than that at `path`."""
        check_tokenizer(self.prefixes[0], self._first, digest=digest, path=path)

    def check_indexes(self) -> None:
        """Read the first CHECKED_BYTES of `.idx` files whole.

        Raises: ValueError if the digest of one is not its manifest's.
        """
        left = CHECKED_BYTES
        for prefix in self.prefixes:
            path = local_part(prefix, ".manifest.json", cache_dir=self._cache_dir)
            manifest = load_manifest(path)
            left -= manifest.idx_bytes
            if left < 0:
                return
            check_index_digest(prefix, manifest, cache_dir=self._cache_dir)

    def eligible_document(self, place: int) -> int:
        """Number of the eligible document at a place in [0, num_eligible)."""
        file = int(np.searchsorted(self._eligible, place, side="right")) - 1
        local = self._file(file)[1].select(place - int(self._eligible[file]))
        return int(self._documents[file]) + local

    def place_of(self, document: int) -> int | None:
        """The place of a document among the eligible ones, None if it is not eligible.

        Raises: ValueError if the document is outside [0, num_documents).
        """
        file, local = self.locate(document)
        mask = self._file(file)[1]
        return int(self._eligible[file]) + mask.rank(local) if local in mask else None

    def document(self, i: int) -> np.ndarray:
        """int32[T]: a copy of document i, its end-of-document id included."""
        file, local = self.locate(i)
        return self._file(file)[0].document(local)

    def number_of(self, file: int, local: int) -> int:
        """Number of a document from its dataset and its number in it.

        Raises: ValueError if the dataset has no such document.
        """
        size = int(self._documents[file + 1] - self._documents[file])
        if not 0 <= local < size:
            raise ValueError(f"{self.prefixes[file]}: document {local} must be in [0, {size})")
        return int(self._documents[file]) + local

    def locate(self, i: int) -> tuple[int, int]:
        """(dataset, number of the document in it) of document i.

        Raises: ValueError if i is outside [0, num_documents).
        """
        if not 0 <= i < self.num_documents:
            raise ValueError(f"document {i} must be in [0, {self.num_documents})")
        file = int(np.searchsorted(self._documents, i, side="right")) - 1
        return file, i - int(self._documents[file])

    def _check_alike(self, prefix: str, manifest: Manifest, first: Manifest) -> None:
        for field in _SHARED:
            found, wanted = getattr(manifest, field), getattr(first, field)
            if found != wanted:
                raise ValueError(
                    f"{prefix} has {field} {found}, {self.prefixes[0]} has {wanted}; datasets of "
                    "one blend must be made with the same tokenizer and settings"
                )

    def _header(self, file: int, manifest: Manifest) -> MaskHeader:
        """Facts about the eligible documents of a dataset; makes the mask if none fits."""
        path = local_part(
            self.prefixes[file], f".{self.mask or 'eligible'}", cache_dir=self._cache_dir
        )
        header = load_header(path)
        if header.idx_xxh3_128 != manifest.idx_xxh3_128 or header.documents != manifest.documents:
            raise ValueError(
                f"{path} was made of other data than {self.prefixes[file]}.idx; make it again "
                "with tools/dataset.py mask"
            )
        fits = header.min_tokens >= self.min_tokens if self.mask else (
            header.min_tokens == self.min_tokens
        )  # fmt: skip
        if fits:
            return header
        check_index_digest(self.prefixes[file], manifest, cache_dir=self._cache_dir)
        dataset = IndexedDataset(self.prefixes[file], cache_dir=self._cache_dir)
        long_enough = dataset.document_lengths() - int(manifest.append_eod) >= self.min_tokens
        dataset.close()
        members = load_mask(path).members() & long_enough if self.mask else long_enough
        self._made[file] = mask_of(members, min_tokens=self.min_tokens)
        return self._made[file].header

    def _file(self, file: int) -> tuple[IndexedDataset, DocumentMask]:
        """A dataset and its eligible documents, opened and checked if it is not open."""
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        dataset = IndexedDataset(self.prefixes[file], cache_dir=self._cache_dir)
        mask = self._made.get(file)
        if mask is None:
            suffix = f".{self.mask or 'eligible'}"
            mask = load_mask(local_part(self.prefixes[file], suffix, cache_dir=self._cache_dir))
        self._open[file] = dataset, mask
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)[1][0].close()
        return dataset, mask
