"""Tables for people. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Line up columns: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *row[1:]]).rstrip() for line, row in zip(lines, rows, strict=True)
    )
