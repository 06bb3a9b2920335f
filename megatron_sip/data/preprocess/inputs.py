"""Which files to read: globs, folders and fsspec URLs to a sorted list of files of known kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

Kind = Literal["jsonl", "txt", "parquet", "arrow"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True)
class InputFile:
    """One file. Args: url: path or URL. bytes: its size. compression: suffix, "" for none."""

    url: str
    bytes: int
    kind: Kind
    compression: str


def expand_inputs(patterns: Sequence[str], *, follow_links: bool = False) -> list[InputFile]:
    """Files that paths, folders, globs (`**` for folders at any depth) and URLs name.

    Of a folder the files of known kinds are taken, at any depth. The order is that of the names,
    each file once.

    Args:   follow_links: read links that lead out of the folder or pattern they lie in.
    Raises: ValueError if a pattern matches no file, a named file is of no known kind or empty, or
            a link leads out.
    """
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        files, path = fsspec.core.url_to_fs(pattern)
        names = list(_matches(files, path))
        if not names:
            raise ValueError(f"--input {pattern!r} matches no file; check path and quotes")
        for name, inside in names:
            if isinstance(files, LocalFileSystem) and inside and not follow_links:
                _check_link(Path(name), Path(inside))
            url = name if isinstance(files, LocalFileSystem) else files.unstrip_protocol(name)
            found[url] = _input_file(url, int(files.size(name) or 0))
    return [found[url] for url in sorted(found)]


def _matches(files: Any, path: str) -> Iterator[tuple[str, str]]:
    """(file, folder that it must not leave; "" for a file that was named itself)."""
    if files.isdir(path):
        yield from _folder(files, path)
        return
    if files.isfile(path):
        yield path, ""
        return
    base = path[: min(path.index(c) for c in "*?[" if c in path)] if set("*?[") & set(path) else ""
    for name in files.glob(path) if base else ():
        if files.isfile(name):
            yield name, base.rpartition("/")[0] or "/"


def _folder(files: Any, path: str) -> Iterator[tuple[str, str]]:
    """Files of known kinds below a folder. Raises: ValueError if its form cannot be read right."""
    names = [str(name) for name in files.find(path)]
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == "dataset_dict.json":
            raise ValueError(
                f"--input {folder} holds several splits of a Hugging Face dataset, which are not "
                "to be mixed; name the folder of one split"
            )
        if last == "state.json":
            try:
                state = json.loads(files.cat_file(name))
            except ValueError:
                state = None
            if isinstance(state, dict) and state.get("_indices_data_files"):
                raise ValueError(
                    f"--input {folder} is a Hugging Face dataset with a selection of rows that "
                    "its files do not show; save it again after flatten_indices()"
                )
    known = [name for name in names if _kind_of(name) is not None]
    if not known:
        raise ValueError(
            f"--input {path}: none of the {len(names)} files in this folder ends in one of "
            f"{', '.join(KINDS)}, perhaps followed by one of {', '.join(COMPRESSIONS)}"
        )
    for name in known:
        yield name, path


def _kind_of(name: str) -> tuple[Kind, str] | None:
    """(kind, compression) by the name of a file."""
    path = Path(name)
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = KINDS.get(path.with_suffix("").suffix if compression else path.suffix)
    is_table = kind in ("parquet", "arrow")
    return None if kind is None or (compression and is_table) else (kind, compression)


def _input_file(url: str, size: int) -> InputFile:
    found = _kind_of(url)
    if found is None:
        raise ValueError(
            f"--input {url}: the name must end in one of {', '.join(KINDS)}; .jsonl and .txt "
            f"perhaps followed by one of {', '.join(COMPRESSIONS)}"
        )
    if size == 0:
        raise ValueError(f"--input {url} is empty (0 bytes); remove it from the input")
    return InputFile(url, size, *found)


def _check_link(path: Path, folder: Path) -> None:
    """Raises: ValueError if following links leads out of the folder."""
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(
            f"--input {path} is a link out of {folder}, to {target}; give --follow-links if it is "
            "to be read, or remove it"
        )
