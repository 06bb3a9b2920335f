"""Errors of disks and object stores, told with the file's name and a remedy.

s3fs, gcsfs and their like raise errors of their own libraries beside those of the system. None of
them need be installed, so these errors are known by the packages that they come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = {
    "botocore", "aiobotocore", "s3fs", "gcsfs", "google", "azure", "adlfs", "aiohttp", "requests",
}  # fmt: skip
# What the message says of an error whose kind says nothing.
_ACCESS = re.compile(
    r"access ?denied|credential|forbidden|unauthori[sz]ed|access ?key|signature|expired ?token"
    r"|\b40[13]\b",
    re.IGNORECASE,
)
_ABSENT = re.compile(r"no ?such ?(bucket|key)|not ?found|does not exist|\b404\b", re.IGNORECASE)


@contextmanager
def store_errors(name: str) -> Iterator[None]:
    """For looking at what is there. Raises: ValueError for any error of the system or a store."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not _is_foreign(error):
            raise
        raise ValueError(_told(name, error)) from None


@contextmanager
def read_errors(name: str) -> Iterator[None]:
    """For reading and decoding: what may as well be damage of the file passes.

    Raises: ValueError for an error that is surely one of the system or a store.
    """
    try:
        yield
    except Exception as error:
        if not _is_access(error) and not _is_foreign(error):
            raise
        raise ValueError(_told(name, error)) from None


def _is_foreign(error: Exception) -> bool:
    """Whether an error comes from a library of an object store."""
    return any(kind.__module__.partition(".")[0] in _PACKAGES for kind in type(error).__mro__)


def _is_access(error: Exception) -> bool:
    """Whether an error is of a kind that decoders do not raise."""
    kinds = (PermissionError, FileNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or (isinstance(error, OSError) and error.errno is not None)


def _told(name: str, error: Exception) -> str:
    reason = str(error)[:300]
    if _is_foreign(error) or not reason:
        reason = f"{type(error).__name__}{': ' * bool(reason)}{reason}"
    said = "" if isinstance(error, OSError) and error.errno is not None else reason
    if isinstance(error, PermissionError) or _ACCESS.search(said):
        remedy = "check that the credentials of this store, or the permissions, allow to read it"
    elif isinstance(error, FileNotFoundError) or _ABSENT.search(said):
        remedy = "check the bucket or folder and the path"
    else:
        remedy = "check the network or disk, and run it again"
    return f"{name} cannot be read ({reason}); {remedy}"
