"""Parts of a dataset on a local disk or in an object store.

A prefix with "://" is an fsspec URL (s3://, gs://, memory://). Of such a dataset the small parts
are copied once to a local cache, each whole under its name or not at all; `.bin` is read by ranges.
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from megatron_sip.data.manifest import part_path
from megatron_sip.data.store_errors import store_errors
from megatron_sip.publish import atomic_write


def is_url(prefix: str | Path) -> bool:
    """Whether a prefix names an object store."""
    return "://" in str(prefix)


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL. Raises: ValueError if it cannot be reached."""
    try:
        with store_errors(url):
            return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(url) else f"{url}: {text}") from None


def expand_prefixes(pattern: str) -> list[str]:
    """Prefixes of the datasets that a pattern names, sorted; a pattern without magic is itself.

    Raises: ValueError if a pattern with `*`, `?` or `[` matches no `.idx` file.
    """
    if not glob.has_magic(pattern):
        return [pattern]
    if is_url(pattern):
        files, path = file_system(pattern + ".idx")
        with store_errors(pattern):
            found = [files.unstrip_protocol(name) for name in files.glob(path)]
            if not found:
                list_folder(files, path)  # says why
    else:
        found = glob.glob(pattern + ".idx", recursive=True)
    if not found:
        raise ValueError(f"{pattern}: no file {pattern}.idx; check the pattern and its quotes")
    return sorted(name.removesuffix(".idx") for name in found)


def list_folder(files: Any, path: str) -> None:
    """List the folder of a path or pattern that names nothing: many errors of a store, such as bad
    credentials, are taken for "nothing there" where a pattern is expanded.

    Raises: the error of the store.
    """
    magic = [path.index(c) for c in "*?[" if c in path]
    files.ls(path[: min(magic)].rpartition("/")[0] if magic else path)


def local_part(prefix: str | Path, suffix: str, *, cache_dir: Path | None) -> Path:
    """Path of a part on this machine, fetched into the cache if the prefix is a URL.

    Raises: ValueError if there is no cache or the part cannot be read.
    """
    if not is_url(prefix):
        return Path(f"{prefix}{suffix}")
    if cache_dir is None:
        raise ValueError(
            f"{prefix} is in an object store; give data.cache_dir, a folder on a local disk for "
            "its index files"
        )
    url = str(prefix) + suffix
    files, remote = file_system(url)
    with store_errors(url):
        facts = files.info(remote)
        version = [str(facts.get(key)) for key in ("size", "ETag", "etag", "mtime", "created")]
        key = hashlib.sha256("\0".join([url, *version]).encode()).hexdigest()[:32]
        path = cache_dir / f"{key}{suffix}"
        if path.is_file():
            return path
        data = files.cat_file(remote)
    atomic_write(path, data)
    return path


def map_file(path: Path) -> np.ndarray:
    """uint8[bytes]: a file, memory-mapped and read-only; `np.memmap` takes five times longer."""
    with open(path, "rb") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


class LocalBytes:
    """Random reads of a local file; holds one open file."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._descriptor = os.open(path, os.O_RDONLY)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count), fewer at the end of the file."""
        parts = []
        while count > 0 and (part := os.pread(self._descriptor, count, start)):
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class RemoteBytes:
    """Random reads of an object by range requests."""

    def __init__(self, url: str) -> None:
        self.name = url
        self._files: Any
        self._files, self._path = file_system(url)

    @property
    def size(self) -> int:
        """Bytes. Raises: ValueError if the object cannot be read."""
        with store_errors(self.name):
            return int(self._files.size(self._path))

    def read(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count). Raises: ValueError if the request fails."""
        with store_errors(self.name):
            return self._files.cat_file(self._path, start=start, end=start + count)

    def close(self) -> None:
        """Nothing is held."""


def open_bytes(prefix: str | Path) -> LocalBytes | RemoteBytes:
    """The `.bin` of a dataset. Raises: ValueError if a local one cannot be opened."""
    if is_url(prefix):
        return RemoteBytes(f"{prefix}.bin")
    path = part_path(Path(prefix), ".bin")
    try:
        return LocalBytes(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
