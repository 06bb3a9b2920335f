"""Leave out documents that share a run of words with an evaluation text.

Runs of 13 words are compared by 64-bit hashes: two different ones are taken for equal about once in
10^13 comparisons with a million stored ones. An evaluation text shorter than a run is looked for
whole if it has at least 8 words; a still shorter one cannot be told from ordinary language: it is
counted and named in the report. Where runs are of 8 words or fewer, no text is looked for whole. A
stored run costs about 100 bytes of memory.

Source: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C (13-grams).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_sip.data.selection.steps import Batch, Objection
from megatron_sip.data.selection.words import ngrams, words_of

NGRAM_WORDS = 13
MIN_WORDS = 8
_NAMED = 20  # texts named in the report as too short


@dataclass(frozen=True)
class EvaluationFile:
    """A file of evaluation texts. Args: path: as given. sha256: of its bytes. texts: its records,
    as (number of the line from 1, text); a .txt file is one record."""

    path: str
    sha256: str
    texts: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class EvaluationIndex:
    """Runs of words of evaluation texts.

    Args: grams: hash of a run to (file, record) of the first text that holds it.
          lengths: numbers of words that runs have, ascending. whole: texts that are shorter than a
          run and looked for whole. too_short: (file, record) of texts that are not looked for.
    """

    grams: dict[int, tuple[str, str]]
    lengths: tuple[int, ...]
    whole: int
    too_short: tuple[tuple[str, str], ...]


class Contamination:
    """The step of a selection.

    Args:   files: evaluation files, see `read_evaluation`. ngram_words: words of a run. min_words:
            of the shortest text that is looked for whole; None: MIN_WORDS, but not more than a run.
    Raises: ValueError as `index_texts` does, or if no file is given or a run has no word.
    """

    name = "contamination"
    columns: tuple[str, ...] = ()

    def __init__(
        self,
        files: Sequence[EvaluationFile],
        *,
        ngram_words: int = NGRAM_WORDS,
        min_words: int | None = None,
    ) -> None:
        if not files:
            raise ValueError("contamination: no evaluation file is given; give at least one")
        if ngram_words < 1:
            raise ValueError(
                f"contamination: --ngram-words is {ngram_words}, but a run has 1 word or more; "
                f"give {NGRAM_WORDS}, or another number"
            )
        min_words = min(MIN_WORDS, ngram_words) if min_words is None else min_words
        self.files, self.ngram_words, self.min_words = tuple(files), ngram_words, min_words
        self._num_texts = sum(len(file.texts) for file in files)
        texts = ((f.path, f"record {i}", text) for f in files for i, text in f.texts)
        self._index = index_texts(texts, ngram_words=ngram_words, min_words=min_words)

    def describe(self) -> dict[str, Any]:
        """Settings and digests of the files."""
        return {
            "ngram_words": self.ngram_words,
            "min_words": self.min_words,
            "files": {file.path: file.sha256 for file in self.files},
        }

    def objections(self, batch: Batch) -> Sequence[tuple[Objection, ...]]:
        """One objection for each evaluation file that shares a run; the file is its rule."""
        return [
            tuple(
                Objection(file, f"{record}: {gram}")
                for file, (record, gram) in shared_runs(text, self._index).items()
            )
            for text in batch.texts
        ]

    def facts(self) -> dict[str, Any]:
        """How many texts were looked for, whole or in runs, and which were too short."""
        return {
            "evaluation_texts": self._num_texts,
            "matched_whole": self._index.whole,
            "too_short": len(self._index.too_short),
            "too_short_first": [
                f"{file}, {record}" for file, record in self._index.too_short[:_NAMED]
            ],
        }


def index_texts(
    texts: Iterable[tuple[str, str, str]], *, ngram_words: int, min_words: int
) -> EvaluationIndex:
    """Runs of words to look for.

    Args:   texts: (file, record, text) of each.
    Raises: ValueError if the lengths are not 1 <= min_words <= ngram_words, or no text is long
            enough to be looked for.
    """
    if not 1 <= min_words <= ngram_words:
        raise ValueError(
            f"contamination: min_words is {min_words} and ngram_words {ngram_words}; they must be "
            "1 <= min_words <= ngram_words"
        )
    grams: dict[int, tuple[str, str]] = {}
    lengths: set[int] = set()
    too_short = []
    whole = 0
    for file, record, text in texts:
        words = words_of(text)
        if len(words) < min_words:
            too_short.append((file, record))
            continue
        n = min(ngram_words, len(words))
        whole += int(n < ngram_words)
        lengths.add(n)
        for gram in ngrams(words, n):
            grams.setdefault(xxhash.xxh3_64_intdigest(gram.encode()), (file, record))
    if not grams:
        raise ValueError(
            f"contamination: none of the {len(too_short)} evaluation texts has {min_words} words "
            "or more, so there is nothing to look for; check the files and the text key"
        )
    return EvaluationIndex(grams, tuple(sorted(lengths)), whole, tuple(too_short))


def shared_runs(text: str, index: EvaluationIndex) -> dict[str, tuple[str, str]]:
    """What a text shares with evaluation texts.

    Returns: evaluation file to (record, run of words), the first of each file in the order of the
             text, longer runs after shorter ones; empty if nothing is shared.
    """
    words = words_of(text)
    found: dict[str, tuple[str, str]] = {}
    for n in index.lengths:
        for gram in ngrams(words, n):
            place = index.grams.get(xxhash.xxh3_64_intdigest(gram.encode()))
            if place is not None:
                found.setdefault(place[0], (place[1], gram))
    return found


def read_evaluation(path: Path, *, text_key: str) -> EvaluationFile:
    """Read a .jsonl file, one record a line, or a .txt file, which is one text.

    Args:   text_key: of the text in a record.
    Raises: ValueError naming file, line, key and remedy if it cannot be read, is of another kind,
            or a record has no text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"evaluation file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"evaluation file {path} is not UTF-8 ({error}); convert it") from None
    if path.suffix == ".txt":
        texts = [(1, text)]
    elif path.suffix == ".jsonl":
        texts = list(_records(text, path, text_key))
    else:
        raise ValueError(f"evaluation file {path}: the name must end in .jsonl or .txt")
    if not texts:
        raise ValueError(f"evaluation file {path} has no record; give another or leave it out")
    return EvaluationFile(str(path), hashlib.sha256(data).hexdigest(), tuple(texts))


def _records(text: str, path: Path, key: str) -> Iterator[tuple[int, str]]:
    for line, record_text in enumerate(text.split("\n"), 1):
        if not record_text.strip():
            continue
        try:
            record = json.loads(record_text)
        except ValueError as error:
            raise ValueError(f"evaluation file {path}, line {line}: not JSON ({error})") from None
        found = record.get(key) if isinstance(record, dict) else None
        if not isinstance(found, str):
            keys = (
                ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            )
            raise ValueError(
                f"evaluation file {path}, line {line}: no text at key {key!r} (there: "
                f"{keys[:200]}); give the key that holds the text"
            )
        yield line, found
