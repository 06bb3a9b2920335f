"""Fast tokenizer backends, and the proof that they give what the exact one gives.

A backend is used only after it gave the same ids as the exact tokenizer on a sample of the input
itself, and goes on being checked on one text in CHECK_EVERY, chosen by the text's digest. Workers
encode the sample and the chosen texts with the backend alone; who runs them compares.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_sip.data.panics import panics_told
from megatron_sip.data.tokenizer import Tokenizer

CHECK_EVERY = 1024  # texts
MAX_CHECKED_CHARS = 1 << 18  # of a text: the exact tokenizer's memory grows with it
_SHOWN_CHARS = 200


class Encoder(Protocol):
    """Token ids of many texts at once."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(int[T] ids, one text after another; int64[texts] tokens of each)."""
        ...


class WrongBackendError(Exception):
    """The fast backend fails, or gives other ids than the exact tokenizer. May be pickled."""


@dataclass(frozen=True)
class Checked:
    """What a fast backend made of some texts. Args: texts. ids, counts: as of `Encoder.encode`."""

    texts: tuple[str, ...]
    ids: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Difference:
    """A text on which a backend is wrong. Args: text: its first characters. fast, exact: ids from
    the first that differs on."""

    text: str
    fast: tuple[int, ...]
    exact: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.text!r}: {list(self.fast)} for {list(self.exact)}"


class ExactEncoder:
    """The library that defines the tokenizer."""

    name = "exact"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined(self._tokenizer.encode_all(texts))


class FastokensEncoder:
    """`fastokens` for a tokenizer.json."""

    def __init__(self, path: Path) -> None:
        import fastokens  # only where it is used: not every machine has it

        self.name = f"fastokens {version('fastokens')}"
        self._tokenizer = fastokens.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))


class GigatokenEncoder:
    """`gigatoken` for a sentencepiece model.

    It takes "</s>" in a text for the end-of-document token, so such texts go to the exact one.
    """

    def __init__(self, path: Path) -> None:
        import gigatoken  # only where it is used: not every machine has it

        self.name = f"gigatoken {version('gigatoken')}"
        self._fast = gigatoken.Tokenizer.from_sentencepiece(str(path))
        self._tokenizer = Tokenizer.load(path)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        special = self._tokenizer.special_texts
        plain = [text for text in texts if not any(s in text for s in special)]
        layout: Any = self._fast.encode_batch(plain, parallel=False).layout
        offsets = layout.offsets.data
        ids, counts = layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)
        if len(plain) == len(texts):
            return ids, counts
        found = iter(np.split(ids, np.cumsum(counts)[:-1]) if plain else ())
        return _joined(
            [
                self._tokenizer.encode(text) if any(s in text for s in special) else next(found)
                for text in texts
            ]
        )


def fast_encoder(path: Path) -> tuple[Encoder | None, str]:
    """(fast backend for a tokenizer's file, "") or (None, why there is none)."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # one thread a worker, whatever the backend's default
    name, kind = (
        ("fastokens", FastokensEncoder)
        if path.suffix == ".json"
        else ("gigatoken", GigatokenEncoder)
    )
    try:
        with panics_told("it panicked"):
            return kind(path), ""
    except (ImportError, PackageNotFoundError):
        return None, f"{name} is not installed (pip install {name} makes this several times faster)"
    except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
        return None, f"{name} refuses {path} ({error})"


def encode_checked(encoder: Encoder, texts: Sequence[str]) -> Checked:
    """The beginnings of these texts, for `difference`."""
    beginnings = tuple(text[:MAX_CHECKED_CHARS] for text in texts)
    return Checked(beginnings, *(encoder.encode(beginnings) if beginnings else _joined(())))


def difference(checked: Checked, tokenizer: Tokenizer) -> Difference | None:
    """First text that was not encoded as `tokenizer` does."""
    parts = np.split(checked.ids, np.cumsum(checked.counts)[:-1]) if checked.texts else ()
    all_exact = tokenizer.encode_all(checked.texts) if checked.texts else ()
    for text, fast, exact in zip(checked.texts, parts, all_exact, strict=True):
        if fast.tolist() != exact:
            pairs = enumerate(zip(fast.tolist(), exact, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(fast), len(exact)))
            start = max(0, len(tokenizer.decode(exact[:at])) - _SHOWN_CHARS // 2)
            return Difference(
                text[start : start + _SHOWN_CHARS],
                tuple(fast.tolist()[at : at + 8]),
                tuple(exact[at : at + 8]),
            )
    return None


def _joined(lists: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(ids) for ids in lists], np.int64)
    parts = [np.asarray(ids, np.int64) for ids in lists]
    return (np.concatenate(parts) if parts else np.zeros(0, np.int64)), counts
