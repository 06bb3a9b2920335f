"""Facts about a dataset for people (rich), for programs (JSON) and as a picture (matplotlib).

Text of documents and names of files are shown inert: what is not printable stands as an escape,
and nothing in them is read as markup.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_sip.data.maintenance.inspect import Facts
from megatron_sip.publish import atomic_file

_MAX_SOURCES = 20  # rows of the table
_BAR = 40  # characters


def inert(text: str) -> str:
    """Text that does nothing to a terminal: what is not printable stands as an escape, as in
    Python's own notation; a backslash is doubled, so that no two texts look alike."""
    return "".join("\\\\" if c == "\\" else c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_json(facts: Facts) -> str:
    """One JSON object on several lines; the keys are the fields of `Facts`."""
    found = asdict(facts) | {"manifest": facts.manifest.model_dump(exclude={"sources"})}
    return json.dumps(found, indent=2)


def print_facts(facts: Facts, console: Console) -> None:
    """Tables, a histogram and the samples."""
    console.print(render(facts))


def render(facts: Facts) -> RenderableType:
    """What `print_facts` prints."""
    count = len(facts.sources)
    tables = (
        (inert(facts.prefix), _summary(facts)),
        ("tokens of a document", _lengths(facts)),
        ("histogram", _histogram(facts)),
        (f"{count:,} source{'s' if count > 1 else ''}", _sources(facts)),
    )
    parts: list[RenderableType] = []
    for title, table in tables:
        parts += [Text(f"\n{title}", "bold cyan", overflow="fold"), table]
    for sample in facts.samples:
        title = f"document {sample.document:,}, {sample.tokens:,} tokens"
        parts.append(Text(f"\n{title}{'' if sample.whole else ', its beginning'}", "bold cyan"))
        parts.append(Text(inert(sample.text), overflow="fold"))
    return Group(*parts)


def plot(facts: Facts, path: Path) -> None:
    """Draw documents and tokens by length as a PNG file.

    Raises: ValueError if the name does not end in .png, or matplotlib is not installed.
    """
    if path.suffix != ".png":
        raise ValueError(f"--plot {path}: the file name must end in .png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('--plot needs matplotlib; pip install "megatron_sip[eval]"') from None
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    positions = range(len(facts.histogram))
    for axis, name in zip(axes, ("documents", "tokens"), strict=True):
        axis.bar(positions, [getattr(b, name) for b in facts.histogram], width=0.9)
        axis.set_ylabel(name)
        axis.grid(axis="y", alpha=0.3)
    axes[-1].set_xticks(positions, [f"{b.low:,}" for b in facts.histogram], rotation=45, ha="right")
    axes[-1].set_xlabel("tokens of a document, up to the next mark")
    figure.suptitle(
        f"{inert(facts.prefix)}: {facts.manifest.documents:,} documents, "
        f"{facts.manifest.tokens:,} tokens",
        parse_math=False,
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _table(*columns: str) -> Table:
    """Columns whose name begins with ">" hold numbers and stand to the right."""
    table = Table(
        box=None, pad_edge=False, header_style="dim",
        show_header=any(name.strip(">") for name in columns),
    )  # fmt: skip
    for name in columns:
        justify = "right" if name.startswith(">") else "left"
        table.add_column(Text(name.removeprefix(">")), justify=justify, overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(inert(cell)) for cell in cells))


def _summary(facts: Facts) -> Table:
    manifest, table = facts.manifest, _table("", "")
    share = 100 * facts.eligible / manifest.documents
    split = f"{manifest.split} of {manifest.split_shares}" if manifest.split else "none"
    sequences = f" in {facts.sequences:,} sequences"
    rows = {
        "documents": f"{manifest.documents:,}"
        + (sequences if facts.sequences != manifest.documents else ""),
        "tokens": f"{manifest.tokens:,} ({manifest.dtype})",
        "eligible": f"{facts.eligible:,} ({share:.1f} %) with {facts.min_tokens:,} tokens or more",
        "end of document": f"id {manifest.eod} "
        + ("ends each document" if manifest.append_eod else "ends no document"),
        "vocabulary": f"{manifest.vocab_size:,} ids, tokenizer {manifest.tokenizer_digest[:12]}",
        "made by": f"{manifest.made_by}, {manifest.bad_records:,} bad records left out",
        "split": split,
        "kept columns": ", ".join(facts.kept) or "none",
        "bytes": f"{sum(facts.bytes.values()):,} ("
        + ", ".join(f"{suffix} {size:,}" for suffix, size in facts.bytes.items())
        + ")",
        "digest": facts.data_digest,
    }
    for name, value in rows.items():
        _row(table, name, value)
    return table


def _lengths(facts: Facts) -> Table:
    table = _table("", ">")
    _row(table, "mean", f"{facts.mean:,.1f}")
    _row(table, "shortest", f"{facts.shortest:,}")
    for percent, length in facts.percentiles.items():
        _row(table, "median" if percent == 50 else f"{percent} % up to", f"{length:,.1f}")
    _row(table, "longest", f"{facts.longest:,}")
    return table


def _histogram(facts: Facts) -> Table:
    table = _table(">from", ">below", ">documents", "", ">tokens")
    most = max(b.documents for b in facts.histogram)
    for b in facts.histogram:
        width = -(-_BAR * b.documents // most)  # a document is seen
        _row(table, f"{b.low:,}", f"{b.high:,}", f"{b.documents:,}", "█" * width, f"{b.tokens:,}")
    return table


def _sources(facts: Facts) -> Table:
    table = _table("file", ">documents", ">tokens", ">bytes")
    for source in facts.sources[:_MAX_SOURCES]:
        size = f"{source.bytes:,}" if source.path else ""
        _row(table, source.path or "unknown", f"{source.documents:,}", f"{source.tokens:,}", size)
    if len(facts.sources) > _MAX_SOURCES:
        rest = facts.sources[_MAX_SOURCES:]
        documents, tokens = sum(s.documents for s in rest), sum(s.tokens for s in rest)
        _row(table, f"{len(rest):,} more", f"{documents:,}", f"{tokens:,}", "")
    return table
