"""Train the policy's tokenizer: byte-fallback BPE that restores every text exactly."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_sip.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_sip.publish import atomic_file

_MAX_LINE_CHARS = 100_000  # sentencepiece drops longer lines silently; we cut them instead


def _lines(documents: Iterator[str]) -> Iterator[str]:
    """Lines of all documents; newlines themselves stay out and so become byte pieces."""
    for document in documents:
        for line in document.split("\n"):
            for start in range(0, len(line), _MAX_LINE_CHARS):
                yield line[start : start + _MAX_LINE_CHARS]


def train_tokenizer(documents: Iterator[str], *, vocab_size: int, output: Path) -> Tokenizer:
    """Train a byte-fallback BPE tokenizer and publish it atomically.

    The same documents in the same order give the same file. The text is held in memory while
    training runs, so give a sample of a large corpus.

    Args:    documents: texts. vocab_size: pieces in all, 256 bytes and two special ones included.
             output: the `.model` file; an older one is replaced.
    Returns: the tokenizer, loaded.
    Raises:  ValueError if sentencepiece cannot make that many pieces from the text; errors of
             `documents` pass through. Nothing is written in either case.
    """
    lines = _lines(documents)
    first = next(lines, None)
    if first is None:
        raise ValueError("train_tokenizer: there is no text to train on; check --input and --only")
    model, problems = io.BytesIO(), []

    def watched() -> Iterator[str]:
        try:
            yield first
            yield from lines
        except Exception as error:  # passed on below: sentencepiece would bury it in its own
            problems.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=8 * _MAX_LINE_CHARS,  # bytes
            num_threads=1,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if problems:
            raise problems[0] from None
        raise ValueError(
            f"--vocab-size {vocab_size} cannot be trained on this text: {error}"
        ) from None
    tokenizer = SentencePieceTokenizer(model.getvalue(), name=str(output))
    with atomic_file(output) as temporary:
        temporary.write_bytes(model.getvalue())
    return tokenizer
