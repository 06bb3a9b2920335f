"""Documents from files, streamed: `.jsonl` (one JSON object a line) and `.txt` (one document).

A record that cannot be used is counted with its file and line; more than the allowed number is
an error. Nothing is skipped silently.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SUFFIXES = (".jsonl", ".txt")
_MAX_NAMED = 10  # bad records named in a message


@dataclass
class BadRecords:
    """Count of unusable records, and where the first of them stand."""

    limit: int
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one. Raises: ValueError once there are more than `limit`."""
        self.count += 1
        if len(self.places) < _MAX_NAMED:
            self.places.append(f"{place}: {reason}")
        if self.count > self.limit:
            raise ValueError(
                f"{self.count} bad records are more than --max-bad-records {self.limit}; repair "
                "them or raise the limit; nothing was written:\n  " + "\n  ".join(self.places)
            )


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files that globs name (`**` for folders at any depth), sorted, each once.

    Raises: ValueError if a pattern matches no file, or a file is neither .jsonl nor .txt.
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = {Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()}
        if not paths:
            raise ValueError(f"--input {pattern!r} matches no file; check path and quotes")
        found |= paths
    for path in sorted(found):
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"--input {path}: file name must end in one of {', '.join(_SUFFIXES)}")
    return sorted(found)


def _checked(text: object, *, key: str) -> str:
    """`text` if it can be a document. Raises: ValueError with the reason if not."""
    if not isinstance(text, str):
        raise ValueError(f"{key} is {type(text).__name__}, but must be a string")
    if not text:
        raise ValueError(f"{key} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half of a surrogate pair") from None
    return text


def _json_text(line: bytes, *, text_key: str) -> str:
    """Text of one JSON record. Raises: ValueError with the reason if it has none."""
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    for part in text_key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"no key {part!r} of {text_key!r}")
        value = value[part]
    return _checked(value, key=text_key)


def read_documents(
    paths: Sequence[Path], *, text_key: str, bad: BadRecords
) -> Iterator[tuple[str, int]]:
    """Stream documents in the order of `paths`; one record is in memory at a time.

    Args:   paths: from `expand_inputs`. text_key: key of the text in JSON, dots go deeper.
            bad: counts records that are left out.
    Yields: (text, bytes read for it). Blank lines of .jsonl are no records.
    Raises: ValueError if there are more bad records than `bad` allows.
    """
    for path in paths:
        if path.suffix == ".txt":
            data = path.read_bytes()
            try:
                yield _checked(data.decode(), key="file"), len(data)
            except ValueError as error:
                bad.add(f"{path}:1", str(error))
            continue
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    text = _json_text(line, text_key=text_key)
                except ValueError as error:
                    bad.add(f"{path}:{number}", str(error))
                    continue
                yield text, len(line)
