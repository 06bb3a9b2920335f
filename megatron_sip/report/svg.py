"""Small SVG pictures that keep their text size at any width.

A picture is as wide as its box: text and grid stand at percentages, curves in a nested drawing
that is stretched without its strokes. Colours come from classes (report.css), so that light, dark
and print agree. Elements are built as a tree: whatever a label holds, it is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
from markupsafe import Markup


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: np.ndarray  # [T]
    y: np.ndarray  # [T]; NaN makes a gap
    classes: str  # colour and dash: "c0 d0"


@dataclass(frozen=True)
class Axes:
    """Ranges of a picture; y in log10 where `log`."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place in percent of the box, y downwards."""
        value = math.log10(y) if self.log else y
        (x0, x1), (y0, y1) = self.x, self.y
        return 100 * (x - x0) / (x1 - x0), 100 * (y1 - value) / (y1 - y0)


def render(element: Element) -> Markup:
    """Text of an element; every label in it is escaped."""
    return Markup(tostring(element, encoding="unicode"))


def text(parent: Element, content: str, **attributes: str) -> None:
    """Add a text; `text_anchor` and `class_` stand for text-anchor and class."""
    names = {k: k.rstrip("_").replace("_", "-") for k in attributes}
    SubElement(parent, "text", {names[k]: v for k, v in attributes.items()}).text = content


def minus(content: str) -> str:
    """The same with real minus signs."""
    return content.replace("-", "\N{MINUS SIGN}")


def percent(value: float) -> str:
    return f"{value:.2f}%"


def axes_for(
    lines: Sequence[Line], *, log: bool, include: Iterable[float] = (), fixed: Sequence[float] = ()
) -> Axes | None:
    """Ranges that hold all lines; None if there is nothing to show.

    Args: include: further y values that must be inside; fixed: (low, high) of y, instead.
    """
    y = np.concatenate([line.y for line in lines] or [np.zeros(0)])
    x = np.concatenate([line.x for line in lines] or [np.zeros(0)])
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if log:
        x, y = x[y > 0], y[y > 0]
    if not len(y):
        return None
    y = np.concatenate([y, [v for v in include if not log or v > 0]])
    if log:
        y = np.log10(y)
    low, high = fixed or (float(y.min()), float(y.max()))
    if not fixed:
        gap = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
        low, high = low - gap, high + gap
    x0, x1 = float(x.min()), float(x.max())
    return Axes((x0 - 0.5, x1 + 0.5) if x0 == x1 else (x0, x1), (low, high), log)


def ticks(low: float, high: float, number: int) -> list[float]:
    """Round values within [low, high], about `number` of them."""
    raw = (high - low) / number
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, spacing: float) -> str:
    """As many decimals as `spacing` needs."""
    decimals = max(0, -math.floor(math.log10(spacing) + 1e-9))
    if decimals > 4:
        return minus(f"{value:.1e}")
    return minus(f"{value:,.{decimals}f}")


def frame(
    axes: Axes, *, unit: str, title: str, x_name: str = "step", whole: bool = True
) -> Element:
    """An empty picture with grid, ticks and axis names; `whole`: x ticks at whole numbers only."""
    root = Element("svg", {"class": "plot", "role": "img", "aria-label": title})
    group = SubElement(root, "g", {"class": "lattice"})
    for place, label in _y_ticks(axes):
        at = percent(axes.at(axes.x[0], place)[1])
        SubElement(group, "line", {"x1": "0", "x2": "100%", "y1": at, "y2": at})
        text(group, label, x="-8", y=at, dy="0.32em", text_anchor="end")
    inside = ticks(*axes.x, 5)
    spacing = inside[1] - inside[0] if len(inside) > 1 else 1.0
    for place in inside:
        if not whole or abs(place - round(place)) < 1e-9:
            label = tick_label(place, max(spacing, 1.0) if whole else spacing)
            at = percent(axes.at(place, 1)[0])
            text(group, label, x=at, y="100%", dy="1.5em", text_anchor="middle")
    text(group, unit, x="-46", y="0", dy="-0.9em", class_="axis")
    text(group, x_name, x="100%", y="100%", dy="2.9em", text_anchor="end", class_="axis")
    return root


def _y_ticks(axes: Axes) -> list[tuple[float, str]]:
    low, high = axes.y
    if axes.log:
        powers = range(math.ceil(low), math.floor(high) + 1)
        every = max(1, math.ceil(len(powers) / 5))
        return [(10.0**p, minus(f"1e{p}")) for p in powers][::every]
    inside = ticks(low, high, 5)
    spacing = inside[1] - inside[0] if len(inside) > 1 else high - low
    return [(value, tick_label(value, spacing)) for value in inside]


def stretched(root: Element) -> Element:
    """A drawing of 1000 x 1000 units over the whole box of `root`."""
    box = {"width": "100%", "height": "100%", "viewBox": "0 0 1000 1000"}
    return SubElement(root, "svg", {**box, "preserveAspectRatio": "none", "class": "curves"})


def draw_line(canvas: Element, axes: Axes, line: Line, *, extra: str = "") -> None:
    """Add a curve to a `stretched` drawing; a lone point becomes a short dash."""
    pieces: list[list[str]] = [[]]
    for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(y) or (axes.log and y <= 0):
            pieces.append([])
            continue
        px, py = axes.at(x, y)
        pieces[-1].append(f"{10 * px:.1f},{10 * py:.1f}")
    path = " ".join(
        "M" + " L".join(piece if len(piece) > 1 else [piece[0], piece[0]])
        for piece in pieces
        if piece
    )
    if path:
        SubElement(canvas, "path", {"d": path, "class": f"{line.classes} {extra}".strip()})


def draw_guide(root: Element, axes: Axes, value: float, label: str) -> None:
    """A dashed level with its name."""
    at = percent(axes.at(axes.x[0], value)[1])
    SubElement(root, "line", {"class": "guide", "x1": "0", "x2": "100%", "y1": at, "y2": at})
    text(root, label, x="4", y=at, dy="-0.35em", class_="guide-name")


def draw_dots(root: Element, axes: Axes, line: Line) -> None:
    """A dot with its value at each point."""
    for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if math.isfinite(y) and (y > 0 or not axes.log):
            px, py = axes.at(x, y)
            at = {"cx": percent(px), "cy": percent(py)}
            SubElement(root, "circle", {**at, "r": "4", "class": f"dot {line.classes}"})
