"""Pieces of printed text: headings and tables without lines."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text


def head(out: Console, title: str) -> None:
    """A blank line and the heading of a section."""
    out.print()
    out.print(title, style="bold cyan")


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table; columns whose name begins with ">" hold numbers and stand to the right."""
    found = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        found.add_column(name.removeprefix(">"), justify="right" if name[0] == ">" else "left")
    for row in rows:
        found.add_row(*map(Text, row))
    return found
