"""The policy's tokenizer: a sentencepiece model.

Models of `tokenizer_training` restore every text exactly (identity normalisation, no dummy
prefix, bytes for what the vocabulary lacks, newlines included), but for the character U+2581,
which is how sentencepiece writes a space. There is no begin-of-text id; the end-of-sentence id
ends documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

WORD_START = "\u2581"


class Tokenizer:
    """A loaded sentencepiece model. Use `Tokenizer.load`."""

    def __init__(self, model: bytes, *, name: str) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer {name}: {len(model)} bytes are not a sentencepiece model ({error}); "
                "make one with tools/train_tokenizer.py"
            ) from None
        self.digest: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(
                f"tokenizer {name} has no end-of-sentence id, which ends every document; "
                "train one with tools/train_tokenizer.py"
            )

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `.model` file.

        Raises: ValueError if the file is missing, empty, no sentencepiece model, or has no eos.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"tokenizer {path} cannot be read ({error.strerror}); "
                "make one with tools/train_tokenizer.py"
            ) from None
        return cls(model, name=str(path))

    @cached_property
    def word_starts(self) -> np.ndarray:
        """bool[V]: the piece of this id begins a word, that is with a space."""
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocab_size))
        return np.array([piece.startswith(WORD_START) for piece in pieces], dtype=bool)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the end-of-document id."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; end-of-document ids add nothing, an incomplete character is U+FFFD.

        Raises: ValueError if an id is outside [0, vocab_size).
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(
                f"token ids {array.min()}..{array.max()} must lie in [0, {self.vocab_size}); "
                "they come from another tokenizer or from padding of the vocabulary"
            )
        return self._processor.decode(array[array != self.eod].tolist())

    def continuation_text(
        self, prefix_ids: Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray
    ) -> tuple[str, str]:
        """Text of a prefix and what `ids` add to it; leading spaces stay.

        Args:    prefix_ids: int[P]. ids: int[L].
        Returns: (prefix_text, candidate_text). Their concatenation is always the text of
                 prefix + ids. Where the border parts the bytes of one character, that character
                 goes to candidate_text whole.
        """
        prefix_text = self.decode(prefix_ids)
        text = self.decode([*map(int, prefix_ids), *map(int, ids)])
        border = len(prefix_text)
        while not text.startswith(prefix_text[:border]):  # few steps: bytes of one character
            border -= 1
        return text[:border], text[border:]
