"""The policy's tokenizer: a sentencepiece `.model` or a Hugging Face `tokenizer.json`.

Models of `tokenizer_training` restore every text exactly (identity normalisation, no dummy
prefix, bytes for what the vocabulary lacks, newlines included), but for the character U+2581,
which is how sentencepiece writes a space. Text is never parsed for special tokens: "</s>" in a
document is four characters, not the end of it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from megatron_sip.data.panics import is_panic, panics_told

WORD_START = ("\u2581", "\u0120")  # how sentencepiece and byte-level BPE write a space
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
UNKNOWN = "\ufffd"


class Tokenizer(ABC):
    """A loaded tokenizer. Use `Tokenizer.load`.

    Args: digest: sha256 of its file. vocab_size: ids are in [0, vocab_size).
          eod: end-of-document id. special_texts: what a less careful tokenizer takes for a special
          token when it stands in a text.
    """

    digest: str
    vocab_size: int
    eod: int
    special_texts: tuple[str, ...]

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a `.model` or `.json` file.

        Raises: ValueError if the file is missing, no tokenizer, has no end-of-document token, or
                does not give a text the same ids each time (dropout).
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"tokenizer {path} cannot be read ({error.strerror}); "
                "make one with tools/train_tokenizer.py"
            ) from None
        kind = JsonTokenizer if Path(path).suffix == ".json" else SentencePieceTokenizer
        return kind(data, name=str(path))

    @cached_property
    def word_starts(self) -> np.ndarray:
        """bool[V]: the piece of this id begins a word, that is with a space."""
        pieces = (self._piece(i) for i in range(self.vocab_size))
        return np.array([piece.startswith(WORD_START) for piece in pieces], dtype=bool)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the end-of-document id."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(
        self, ids: Sequence[int] | np.ndarray, *, model_vocab_size: int | None = None
    ) -> str:
        """Text of token ids; end-of-document ids add nothing, an incomplete character and an id
        without a piece are U+FFFD.

        Args:   model_vocab_size: ids lie below it, if a model chose them that knows more ids than
                the tokenizer has pieces; None: below vocab_size.
        Raises: ValueError if an id is outside of that.
        """
        array = np.asarray(ids, dtype=np.int64)
        limit = self.vocab_size if model_vocab_size is None else model_vocab_size
        if array.size and not 0 <= array.min() <= array.max() < limit:
            raise ValueError(
                f"token ids {array.min()}..{array.max()} must lie in [0, {limit}); "
                "they come from another tokenizer or from padding of the vocabulary"
            )
        array = array[array != self.eod]
        unknown = np.flatnonzero(self._lacks_piece(array))
        known, *rest = np.split(array, unknown)  # each of the rest begins with an unknown id
        text = self._decode(known.tolist())
        return text + "".join(UNKNOWN + self._decode_within(part[1:].tolist()) for part in rest)

    def _lacks_piece(self, ids: np.ndarray) -> np.ndarray:
        """bool[T] of int64[T]."""
        return ids >= self.vocab_size

    def _decode_within(self, ids: list[int]) -> str:
        """Text of ids that do not begin it: a leading space, which some decoders drop, stays."""
        before = self.encode("a")
        return self._decode([*before, *ids])[len(self._decode(before)) :]

    def continuation_text(
        self,
        prefix_ids: Sequence[int] | np.ndarray,
        ids: Sequence[int] | np.ndarray,
        *,
        model_vocab_size: int | None = None,
    ) -> tuple[str, str]:
        """Text of a prefix and what `ids` add to it; leading spaces stay.

        Args:    prefix_ids: int[P]. ids: int[L]. model_vocab_size: of `ids`, as for `decode`.
        Returns: (prefix_text, candidate_text). Their concatenation is always the text of
                 prefix + ids. Where the border parts the bytes of one character, that character
                 goes to candidate_text whole.
        """
        prefix_text = self.decode(prefix_ids)
        both = [*map(int, prefix_ids), *map(int, ids)]
        text = self.decode(both, model_vocab_size=model_vocab_size)
        border = len(prefix_text)
        while not text.startswith(prefix_text[:border]):  # few steps: bytes of one character
            border -= 1
        return text[:border], text[border:]

    @abstractmethod
    def _piece(self, i: int) -> str:
        """How the vocabulary writes an id."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    def __init__(self, data: bytes, *, name: str) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer {name}: {len(data)} bytes are not a sentencepiece model ({error}); "
                "make one with tools/train_tokenizer.py"
            ) from None
        self.digest = hashlib.sha256(data).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(
                f"tokenizer {name} has no end-of-sentence id, which ends every document; "
                "train one with tools/train_tokenizer.py"
            )
        control = (i for i in range(self.vocab_size) if self._processor.is_control(i))
        self.special_texts = tuple(self._piece(i) for i in control)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _piece(self, i: int) -> str:
        return self._processor.id_to_piece(i)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`.

    Documents end with the first of EOD_TOKENS that is a special token of it, else with the
    `eos_token` of the tokenizer_config.json beside it.
    """

    def __init__(self, data: bytes, *, name: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:  # the library raises bare Exception, or panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise ValueError(
                f"tokenizer {name}: {len(data)} bytes are not a tokenizer.json ({error}); "
                "give the file of a Hugging Face fast tokenizer"
            ) from None
        dropout = getattr(self._tokenizer.model, "dropout", None)
        if dropout:
            raise ValueError(
                f"tokenizer {name}: model.dropout is {dropout:g}, so that a text has other ids "
                "each time, but must have the same; set model.dropout to null in the file"
            )
        self._broken = (
            f"tokenizer {name}: its library panicked on a text; the file contradicts itself: fetch "
            "or make it again"
        )
        self._tokenizer.encode_special_tokens = True  # as text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(data).hexdigest()
        known = list(self._tokenizer.get_vocab().values())
        self.vocab_size = max(known) + 1
        self._has_piece = np.isin(np.arange(self.vocab_size + 1), known)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        self.special_texts = tuple(special)
        ends = [text for text in EOD_TOKENS if text in special] or [_eos_token(Path(name))]
        if ends[0] not in special:
            raise ValueError(
                f"tokenizer {name} has none of the special tokens {', '.join(EOD_TOKENS)}, and "
                "no tokenizer_config.json beside it names its eos_token; add one"
            )
        self.eod = special[ends[0]]

    def _lacks_piece(self, ids: np.ndarray) -> np.ndarray:
        return ~self._has_piece[np.minimum(ids, self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        with panics_told(self._broken):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; unlike it, other threads run meanwhile."""
        with panics_told(self._broken):
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _piece(self, i: int) -> str:
        return self._tokenizer.id_to_token(i) or ""

    def _decode(self, ids: list[int]) -> str:
        with panics_told(self._broken):
            return self._tokenizer.decode(ids, skip_special_tokens=False)


def _eos_token(path: Path) -> str:
    """`eos_token` of the tokenizer_config.json in the same folder, "" if there is none."""
    try:
        found = json.loads((path.parent / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(found.get("content", "") if isinstance(found, dict) else found or "")
