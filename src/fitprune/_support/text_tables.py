"""Tables for people: as text, and in a notebook. Pure Python."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Line up columns: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *row[1:]]).rstrip() for line, row in zip(lines, rows, strict=True)
    )


def bars(title: str, head: Sequence[str], rows: Iterable[tuple[str | float, ...]]) -> str:
    """Make an HTML table under a title; a number is drawn as a bar, of at most 1."""

    def cell(value: str | float) -> str:
        if isinstance(value, str):
            return f"<td>{html.escape(value)}</td>"
        return f"<td><div style='background:#0072b2;height:.7em;width:{100 * value:.1f}px'></div></td>"

    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><caption>{html.escape(title)}</caption><tr>{top}</tr>{lines}</table>"


def plural(count: int, noun: str) -> str:
    """Count things: "1 sample", "2 samples"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def scaled(value: float, unit: str) -> str:
    """Write a large number with three digits or more: "3.46 TFLOPs", "1.92 MB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    digits = 0 if value >= 100 or not prefix else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {prefix}{unit}"
