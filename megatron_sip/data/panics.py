"""Panics of libraries written in Rust, as ordinary errors.

pyo3 raises its PanicException, which is no Exception: no handler of errors sees it, and it cannot
be pickled. Its class cannot be imported, so it is known by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust panicked."""
    return type(error).__name__ == "PanicException"


@contextmanager
def panics_told(what: str) -> Iterator[None]:
    """Raises: ValueError that begins with `what` if a library panics in the block."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"{what} ({str(error)[:200]})") from None
