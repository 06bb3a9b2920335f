"""Input files as streams of bytes, decompressed; one that grows more than text can is refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from megatron_sip.data.preprocess.inputs import InputFile, file_system
from megatron_sip.data.store_errors import read_errors

_MAX_EXPANSION = 250  # decompressed by compressed; text reaches 10 to 30
_FREE_EXPANSION = 1 << 26  # bytes that any file may have
_CHUNK = 1 << 17  # compressed bytes read at a time


def check_expansion(file: InputFile, found: int) -> None:
    """Raises: ValueError if a file does not hold so many bytes of text."""
    limit = max(_FREE_EXPANSION, _MAX_EXPANSION * file.bytes)
    if found > limit:
        raise ValueError(
            f"{file.url}: {file.bytes} bytes expand to more than {limit}, which text does not; "
            "the file is damaged or made to fill the memory; remove it, or write its text to a "
            ".jsonl yourself"
        )


@contextmanager
def open_raw(file: InputFile) -> Iterator[Any]:
    """The file's own bytes. Raises: ValueError in the block if the disk or store fails there."""
    files, path = file_system(file.url)
    with read_errors(file.url), files.open(path, "rb") as raw:
        yield raw


@contextmanager
def open_text(file: InputFile) -> Iterator[TextStream]:
    """The file's text as bytes."""
    with open_raw(file) as raw:
        yield TextStream(_decompressed(raw, file.compression), raw, file)


class TextStream:
    """A stream of decompressed bytes that refuses to grow beyond what text can."""

    def __init__(self, stream: Any, raw: Any, file: InputFile) -> None:
        self._stream, self._raw, self._file = stream, raw, file
        self._read = self._reported = 0  # bytes

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        data = self._stream.read(size)
        self._read += len(data)
        if self._file.compression:
            check_expansion(self._file, self._read)
        return data

    def skip(self, offset: int, *, step: int) -> None:
        """Go to a position in the text. Args: step: bytes read at a time."""
        if not self._file.compression:
            self._stream.seek(offset)
            self._read = offset
        while self._read < offset:
            if not self.read(min(step, offset - self._read)):
                raise ValueError(f"{self._file.url} is shorter than when it was read before")
        self.input_bytes()  # counted by the run that read them

    def input_bytes(self) -> int:
        """Bytes of the file read since the last call."""
        position = min(int(self._raw.tell()), self._file.bytes)
        since, self._reported = position - self._reported, position
        return since


def _decompressed(raw: Any, compression: str) -> Any:
    match compression:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".bz2":
            return _Streams(raw, bz2.BZ2Decompressor)
        case ".xz":
            return _Streams(raw, lzma.LZMADecompressor)
        case ".zst":
            return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return raw


class _Streams:
    """Compressed streams one after another, with zeros between them.

    The libraries' own readers end without a word where a stream's header is damaged, and lose what
    follows the zeros that .xz allows.
    """

    def __init__(self, raw: Any, decompressor: Callable[[], Any]) -> None:
        self._raw, self._new = raw, decompressor
        self._now = decompressor()

    def read(self, size: int) -> bytes:
        """At most so many bytes, fewer only at the end. Raises: EOFError if a stream is cut off."""
        parts = []
        while size and (part := self._some(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _some(self, size: int) -> bytes:
        while True:
            rest = b""
            if self._now.eof:
                rest = self._now.unused_data.lstrip(b"\0")
                while not rest:
                    chunk = self._raw.read(_CHUNK)
                    if not chunk:
                        return b""
                    rest = chunk.lstrip(b"\0")
                self._now = self._new()
            elif self._now.needs_input:
                rest = self._raw.read(_CHUNK)
                if not rest:
                    raise EOFError("it ends in the middle of a stream")
            if part := self._now.decompress(rest, size):
                return part
