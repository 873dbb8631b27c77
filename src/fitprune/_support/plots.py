"""Plots with matplotlib (extra `figures`): a canvas, and how it is written as PNG or SVG."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from fitprune._support import files


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Make a figure of `width` x `height` inches, drawn to files only, and its axes; `options` go to `subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to files only; the user's pyplot state stays alone
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write PNG or SVG, by the name's ending, whole or not at all; the same figure gives the same bytes.

    Args:
        figure: from `canvas`.
        path: the file.

    Raises:
        OSError: `path` cannot be written.
    """
    with files.replacing(path) as temporary:
        if Path(path).suffix.lower() == ".svg":
            temporary.write_text(svg_text(figure), encoding="utf-8")
        else:
            figure.savefig(temporary, format="png", dpi=150)


def svg_text(figure: Any) -> str:
    """Draw as SVG, text as text; the same figure gives the same characters."""
    import matplotlib

    buffer = io.StringIO()
    # An SVG would hold the time of its making, and ids drawn at random.
    with matplotlib.rc_context({"svg.hashsalt": "fitprune", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def require_matplotlib(remedy: str = "") -> None:
    """Find out whether matplotlib is installed, before long work.

    Args:
        remedy: what else to do, for the message.

    Raises:
        ImportError: it is not, or something that it needs is not.
    """
    try:
        import matplotlib  # noqa: F401  # only whether it is there
    except ImportError as error:
        why = "" if error.name == "matplotlib" else f", which cannot be imported ({error})"
        other = f", or {remedy}" if remedy else ""
        raise ImportError(f"pictures need matplotlib{why}: pip install matplotlib{other}") from None
