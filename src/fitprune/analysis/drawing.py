"""Lines, bands, legends and cells in one style, for the pictures of an analysis. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fitprune.analysis.spread import Spread

# Okabe and Ito's colours, which colour-blind readers tell apart too; line styles and markers say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BLUES = ("#deebf7", "#c6dbef", "#9ecae1", "#4292c6", "#08519c")  # light to dark
_DASHES = ("-", "--", "-.", ":")
WIDTH = 7.0  # inches, the text width of a paper
LAYER = "decoder layer (the first is 0)"
_NUMBERED = 12  # cells on a side up to which a matrix shows its figures


def band(axes: Any, where: Sequence[int], spread: Spread, number: int, name: str, band: str | None = None) -> None:
    """Draw a mean as a line and its interval as a band."""
    colour = COLOURS[number % len(COLOURS)]
    axes.fill_between(
        where, spread.low.tolist(), spread.high.tolist(), color=colour, alpha=0.2, linewidth=0, label=band
    )
    axes.plot(where, spread.mean.tolist(), color=colour, **line(number, len(spread.mean)), label=name)


def line(number: int, points: int) -> dict[str, Any]:
    """Give the looks of line `number` of `points` points, without its colour; of many points some get a marker."""
    return {
        "markevery": -(-points // 16),
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 3,
        "linewidth": 1.2,
    }


def style(axes: Any, title: str, below: str, beside: str) -> None:
    """Title a plot and its axes, `below` and `beside` it, and draw its grid."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(below, fontsize=9)
    axes.set_ylabel(beside, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if below.startswith(("decoder", "image")):  # numbered, not measured
        axes.xaxis.get_major_locator().set_params(integer=True)


def legend_below(figure: Any, axes: Any) -> None:
    """Put the legend of one plot under all."""
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)


def legend_beside(figure: Any, axes: Any, title: str) -> None:
    """Put the legend of one plot to the right of all."""
    figure.legend(
        *axes.get_legend_handles_labels(), title=title, frameon=False, fontsize=8, title_fontsize=8,
        loc="outside right center",
    )  # fmt: skip


def numbers(axes: Any, image: Any, matrix: torch.Tensor, form: str) -> None:
    """Write each value into its cell, where there are few; dark on light and light on dark."""
    if len(matrix) > _NUMBERED:
        return
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            if value == value:
                colour = "black" if image.norm(value) > 0.55 else "white"
                axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=colour)


def percent(fraction: float) -> str:
    """Write a fraction as percent: "40%"."""
    return f"{100 * fraction:g}%"
