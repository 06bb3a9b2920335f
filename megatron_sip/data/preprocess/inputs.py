"""Which files to read: globs, folders and fsspec URLs to a sorted list of files of known kinds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from fsspec.implementations.local import LocalFileSystem

from megatron_sip.data import storage
from megatron_sip.data.store_errors import store_errors

_LOGGER = logging.getLogger(__name__)
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
    Raises: ValueError if a pattern matches no file or cannot be read (wrong credentials), a named
            file is of no known kind or empty, or a link leads out.
    """
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        files, path = file_system(pattern)
        with store_errors(f"--input {pattern}"):
            names = list(_matches(files, path))
            if not names:
                _tell_nothing(files, path, pattern)
            for name, inside in names:
                if isinstance(files, LocalFileSystem):
                    _check_link(Path(name), Path(inside) if inside and not follow_links else None)
                url = name if isinstance(files, LocalFileSystem) else files.unstrip_protocol(name)
                found[url] = _input_file(url, int(files.size(name) or 0))
    return [found[url] for url in sorted(found)]


def _tell_nothing(files: Any, path: str, pattern: str) -> NoReturn:
    """Raises: ValueError for a pattern that matches nothing, the store's error if it has one."""
    is_there = True
    try:
        storage.list_folder(files, path)
    except FileNotFoundError:
        is_there = False
    text = f"--input {pattern!r} matches no file; check path and quotes"
    if not is_there and not isinstance(files, LocalFileSystem):
        text += ": there is no such bucket or folder"
    raise ValueError(text)


def file_system(pattern: str) -> tuple[Any, str]:
    """(file system, path in it); in a local path "::" joins no two URLs."""
    if storage.is_url(pattern):
        return storage.file_system(pattern)
    return LocalFileSystem(), str(LocalFileSystem._strip_protocol(pattern))


def _matches(files: Any, path: str) -> Iterator[tuple[str, str]]:
    """(file, folder that it must not leave; "" for a file that was named itself)."""
    if files.isdir(path):
        yield from _folder(files, path)
        return
    if files.isfile(path) or _is_link(files, path):
        yield path, ""
        return
    base = path[: min(path.index(c) for c in "*?[" if c in path)] if set("*?[") & set(path) else ""
    for name in files.glob(path) if base else ():
        if files.isfile(name) or (_is_link(files, name) and not files.isdir(name)):
            yield name, base.rpartition("/")[0] or "/"


def _folder(files: Any, path: str) -> Iterator[tuple[str, str]]:
    """Files of known kinds below a folder. Raises: ValueError if its form cannot be read right."""
    names = list(_below(files, path, ()))
    left_out: set[str] = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == "dataset_dict.json":
            raise ValueError(
                f"--input {folder} holds several splits of a Hugging Face dataset, which are not "
                "to be mixed; name the folder of one split"
            )
        if last == "state.json":
            left_out |= _not_of_dataset(files, name, names)
    known = [name for name in names if _kind_of(name) is not None and name not in left_out]
    if not known:
        raise ValueError(
            f"--input {path}: none of the {len(names)} files in this folder ends in one of "
            f"{', '.join(KINDS)}, perhaps followed by one of {', '.join(COMPRESSIONS)}"
        )
    for name in known:
        yield name, path


def _below(files: Any, path: str, through: tuple[Path, ...]) -> Iterator[str]:
    """Files at any depth, those behind links to folders too.

    Args:   through: folders behind the links on the way to `path`.
    Raises: ValueError if a link leads back to a folder on the way.
    """
    for name in map(str, files.find(path)):
        if not (_is_link(files, name) and files.isdir(name)):
            yield name
            continue
        target = Path(name).resolve()
        if any(p.is_relative_to(target) for p in (*through, Path(name).parent.resolve())):
            raise ValueError(f"--input {name} is a link to {target}, which it lies in; remove it")
        yield from _below(files, name, (*through, target))


def _is_link(files: Any, name: str) -> bool:
    return isinstance(files, LocalFileSystem) and Path(name).is_symlink()


def _not_of_dataset(files: Any, state_name: str, names: Sequence[str]) -> set[str]:
    """Arrow files beside a Hugging Face dataset that are no part of it, such as its caches.

    Raises: ValueError if a part is missing, or the dataset is a selection of its files' rows.
    """
    folder = state_name.rpartition("/")[0]
    try:
        state = json.loads(files.cat_file(state_name))
        parts = {f"{folder}/{part['filename']}" for part in state["_data_files"]}
    except (ValueError, KeyError, TypeError):
        return set()  # another program's state.json
    if state.get("_indices_data_files"):
        raise ValueError(
            f"--input {folder} is a Hugging Face dataset with a selection of rows that "
            "its files do not show; save it again after flatten_indices()"
        )
    if missing := sorted(parts - set(names)):
        raise ValueError(
            f"--input {folder} is a Hugging Face dataset without its {missing[0]}; fetch it again"
        )
    beside = {n for n in names if n.rpartition("/")[0] == folder and _kind_of(n) == ("arrow", "")}
    if beside - parts:
        _LOGGER.warning(
            "%s: left out %d .arrow files that its state.json does not list",
            folder,
            len(beside - parts),
        )
    return beside - parts


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


def _check_link(path: Path, folder: Path | None) -> None:
    """Raises: ValueError if following links leads nowhere or out of the folder."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"--input {path} is a link to {path.readlink()}, which is not there; remove it"
        )
    if folder is None:
        return
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(
            f"--input {path} is a link out of {folder}, to {target}; give --follow-links if it is "
            "to be read, or remove it"
        )
