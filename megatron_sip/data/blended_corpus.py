"""What a split of the recipe's data is: one corpus, or several in a blend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config import BlendPart
from megatron_sip.data.blend import Blend, counts_of_epochs, counts_of_weights
from megatron_sip.data.corpus import OPEN_FILES, Corpus
from megatron_sip.data.storage import expand_prefixes


@dataclass(frozen=True)
class BlendedCorpus:
    """Parts and how many samples of each come in a round. Args: counts: none 0."""

    parts: tuple[Corpus, ...]
    counts: tuple[int, ...]

    @property
    def num_documents(self) -> int:
        """Documents of all parts."""
        return sum(part.num_documents for part in self.parts)

    @property
    def num_eligible(self) -> int:
        """Eligible documents of all parts."""
        return sum(part.num_eligible for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of all parts, end-of-document ids included."""
        return sum(part.tokens for part in self.parts)

    def check_tokenizer(self, digest: str, *, path: Path) -> None:
        """Raises: ValueError if a part was made with another tokenizer than that at `path`."""
        for part in self.parts:
            part.check_tokenizer(digest, path=path)

    def number_of(self, part: int, document: int) -> int:
        """Number of a part's document among those of all parts."""
        return sum(corpus.num_documents for corpus in self.parts[:part]) + document

    @property
    def blend(self) -> Blend:
        """The order of the parts."""
        return Blend(self.counts)

    def identity(self, split: str) -> dict[str, str]:
        """What a checkpoint keeps, to refuse other data: a digest or fact by its name."""
        if len(self.parts) == 1:
            return {split: self.parts[0].digest}
        found = {f"{split}, part {n}": part.digest for n, part in enumerate(self.parts, 1)}
        return found | {f"{split}, samples of each part": str(list(self.counts))}


def open_corpus(
    source: str | Path | Sequence[BlendPart], *, min_tokens: int, cache_dir: Path | None
) -> BlendedCorpus:
    """Open the data of one split.

    Args:   source: prefix or pattern of prefixes, or the parts of a blend.
    Raises: ValueError naming the file and the remedy if data is missing, damaged or contradictory.
    """
    if isinstance(source, Path | str):
        source = (BlendPart(prefix=str(source), weight=1.0),)
    parts = tuple(
        Corpus(
            expand_prefixes(part.prefix),
            min_tokens=min_tokens,
            mask=part.mask,
            cache_dir=cache_dir,
            max_open=max(1, OPEN_FILES // len(source)),
        )
        for part in source
    )
    for part in parts[1:]:
        if part.tokenizer_digest != parts[0].tokenizer_digest or (
            (part.eod, part.append_eod) != (parts[0].eod, parts[0].append_eod)
        ):
            raise ValueError(
                f"{part.prefixes[0]} was made with another tokenizer or end-of-document rule than "
                f"{parts[0].prefixes[0]}; the parts of a blend must agree"
            )
    return BlendedCorpus(parts, _counts(source, parts))


def _counts(source: Sequence[BlendPart], parts: Sequence[Corpus]) -> tuple[int, ...]:
    """Samples of each part in a round, by the measure that the recipe gives."""
    eligible = [part.num_eligible for part in parts]
    weights = [part.weight for part in source if part.weight is not None]
    if weights:
        return counts_of_weights(weights)
    epochs = [
        part.epochs if part.epochs is not None else (part.tokens or 0) / corpus.eligible_tokens()
        for part, corpus in zip(source, parts, strict=True)
    ]
    return counts_of_epochs(epochs, eligible)
