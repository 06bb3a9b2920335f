"""Numbers as short text."""

from __future__ import annotations

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
FLOP_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def bytes_text(count: int | None) -> str:
    """1536 -> "1.50 KiB"; None -> "not known"; 0 -> "-"."""
    if count is None:
        return "not known"
    if count == 0:
        return "-"
    value, unit = _scaled(float(count), BYTE_UNITS, 1024.0)
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def flops_text(count: float | None) -> str:
    """2.5e12 -> "2.50 TFLOP"; None -> "unknown"; 0 -> "-"."""
    if count is None:
        return "unknown"
    if count == 0:
        return "-"
    value, unit = _scaled(count, FLOP_UNITS, 1000.0)
    return f"{value:.2f} {unit}FLOP"


def count_text(count: float) -> str:
    """1234.6 -> "1,235"; 0 -> "-"; below 10 one decimal, since averages may be fractions."""
    if count == 0:
        return "-"
    return f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:.1f}"


def _scaled(value: float, units: tuple[str, ...], base: float) -> tuple[float, str]:
    index = 0
    while value >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    return value, units[index]
