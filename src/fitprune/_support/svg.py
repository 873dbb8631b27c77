"""The pieces of a chart as SVG text: looks of lines and bars, text broken by its estimated width, round figures.

A look is a number: 0 is broad and unbroken, 1 to 7 differ by colour, marker and dash, of 8 to 14 markers are hollow.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from fitprune._support.page import Html, escape

LINE = "var(--line,#d3d8de)"
DOTTED = "stroke='currentColor' stroke-width='1.4' stroke-dasharray='1 3' stroke-linecap='round'"
_MUTED = "fill='var(--muted,#565d66)'"
# As in `fitprune._support.page`, where the page's style is missing.
_COLOURS = ("#1a1d21", "#0072b2", "#d55e00", "#008f68", "#b8578f", "#a97200", "#2a8fca", "#6b737d")
_DASHES = ("7 3", "2 3", "9 3 2 3", "16 3")
_MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2-3.2h6.4v6.4h-6.4z",
    "M0-4.2L4 3H-4z",
    "M0-4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 4.2L4-3H-4z",
    "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "M-4-2.2L-2.2-4L0-1.8L2.2-4L4-2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0z",
)
_SIZE = 12  # of text, pixels
_LONGEST_NAME = 60  # characters in a legend


def picture(width: float, height: float, title: str, description: str, inner: str) -> str:
    """Make an SVG of its real size in pixels, with a title and a description for screen readers."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' "
        f"height='{height:g}' role='img'><title>{escape(title)}</title><desc>{escape(description)}</desc>{inner}</svg>"
    )


def file(picture: str) -> Html:
    """Make a picture stand alone: colours instead of a page's variables, a font, and a white ground."""
    plain = re.sub(r"var\(--\w+,(#\w+)\)", r"\1", picture)
    looks = "<svg font-family='system-ui,Segoe UI,Roboto,sans-serif' font-size='12' color='#1a1d21' "
    ground = "</desc><rect width='100%' height='100%' fill='#fff'/>"
    return Html(plain.replace("<svg ", looks, 1).replace("</desc>", ground, 1))


def painted(look: int, inner: str) -> str:
    """Give a series its colour, which is `currentColor` in it."""
    number = (look - 1) % (len(_COLOURS) - 1) + 1 if look else 0
    return f"<g style='color:var(--c{number},{_COLOURS[number]})'>{inner}</g>"


def text(x: float, y: float, content: str, anchor: str = "start", more: str = _MUTED) -> str:
    """Write a line of text."""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {more}>{escape(content)}</text>"


def paragraph(
    content: str, x: float, y: float, width: float, size: int = _SIZE, more: str = _MUTED, anchor: str = "start"
) -> tuple[list[str], float]:
    """Write text on as many lines as it needs; also gives the height of the line after it."""
    rows = wrapped(content, width, size) if content else []
    step = round(1.3 * size)
    more = f"font-size='{size}' {more}"
    return [text(x, y + step * at, row, anchor, more) for at, row in enumerate(rows)], y + step * len(rows)


def line(x: float, y: float, to_x: float, to_y: float, more: str = "stroke='currentColor'") -> str:
    """Draw a straight line."""
    return f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{to_x:.1f}' y2='{to_y:.1f}' {more}/>"


def polyline(points: Iterable[tuple[float, float]], look: int) -> str:
    """Draw the line of a series."""
    dash = f" stroke-dasharray='{_DASHES[(look - 1) % 7 % 4]}'" if look else ""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f"<polyline points='{joined}' fill='none' stroke='currentColor' stroke-width='{1.6 if look else 2.8}'{dash}/>"
    )


def marker(look: int, x: float, y: float, tip: str = "") -> str:
    """Draw a marker of a series, which says `tip` under the pointer."""
    fill = "var(--bg,#fff)" if look and (look - 1) // 7 % 2 else "currentColor"
    return (
        f"<path d='{_MARKERS[look % 7]}' transform='translate({x:.1f} {y:.1f})' fill='{fill}' stroke='currentColor'>"
        f"{_title(tip)}</path>"
    )


def interval(x: float, top: float, bottom: float) -> str:
    """Draw an interval around a point."""
    path = f"M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 2.5:.1f} {top:.1f}h5M{x - 2.5:.1f} {bottom:.1f}h5"
    return f"<path d='{path}' stroke='currentColor' stroke-opacity='.6' fill='none'/>"


def bar(x: float, y: float, zero: float, width: float, look: int, tip: str = "") -> str:
    """Draw a bar between `zero` and `y`."""
    size = f"width='{max(width - 1, 0.5):.1f}' height='{abs(zero - y):.1f}'"
    return f"<rect x='{x:.1f}' y='{min(y, zero):.1f}' {size} {_filled(look)}>{_title(tip)}</rect>"


def _filled(look: int) -> str:
    """Fill a bar fully, not at all, or by half."""
    return f"fill='currentColor' fill-opacity='{(1, 1, 0, 0.45)[look and (look - 1) % 3 + 1]:g}' stroke='currentColor'"


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def legend(
    series: Sequence[tuple[str, int]], width: float, level: str | None = None, filled: bool = False
) -> tuple[str, int]:
    """Draw a sample of each look, and of a level's line, with its name, in as many columns as fit.

    Args:
        series: name and look of each.
        width: pixels that there are.
        level: name of the level.
        filled: whether the looks are those of bars.

    Returns:
        SVG, and its height.
    """
    samples = []
    for name, look in series:
        swatch = polyline([(0, 0), (30, 0)], look) + marker(look, 15, 0)
        samples.append((name, painted(look, bar(8, -6, 6, 15, look) if filled else swatch)))
    samples += [(level, line(0, 0, 30, 0, DOTTED))] if level is not None else []
    short = [(f"{name[: _LONGEST_NAME - 3]}..." if len(name) > _LONGEST_NAME else name, it) for name, it in samples]
    column = max((width_of(name) for name, _ in short), default=0) + 54
    columns = max(1, int((width - 4) // column))
    parts = []
    for at, (name, sample) in enumerate(short):
        x, y = 4 + at % columns * column, 14 + 20 * (at // columns)
        parts.append(f"<g transform='translate({x:.1f} {y})'>{sample}{text(38, 4, name, more=_STRONG)}</g>")
    return "".join(parts), 20 * -(-len(short) // columns) + 8


_STRONG = "fill='currentColor'"


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Choose round figures, about `most`, that reach from at most `low` to at least `high`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw * 0.999), 10 * power)
    step = max(1.0, math.ceil(step)) if whole else step
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [step * at for at in range(first, min(last, first + 3 * most + 2) + 1)]


def number(value: float) -> str:
    """Write a figure with four digits at most."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}" if abs(value) >= 1e-9 else "0"


def width_of(content: str, size: float = _SIZE) -> float:
    """Estimate how wide a text is, pixels."""
    return sum(size * (1.05 if unicodedata.east_asian_width(sign) in "WF" else 0.58) for sign in content)


def wrapped(content: str, width: float, size: float = _SIZE) -> list[str]:
    """Break a text into lines of at most `width` pixels, between words where it can."""
    rows = [""]
    for word in content.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and width_of(longer, size) > width:
            rows.append(word)
        else:
            rows[-1] = longer
        while width_of(rows[-1], size) > width and len(rows[-1]) > 8 and len(rows) < 12:
            cut = max(4, int(len(rows[-1]) * width / width_of(rows[-1], size)))
            rows[-1:] = [rows[-1][:cut], rows[-1][cut:]]
    return rows
