"""Titles, lines, bands, legends and cells in one style, for the pictures of an analysis. Needs matplotlib.

A picture is one column wide, so that its text is read on a phone and in a column of a paper alike.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from fitprune._support.plots import canvas
from fitprune._support.text_tables import plural
from fitprune.analysis.analyze import FEW, Analysis
from fitprune.analysis.spread import INTERVAL, Spread

# Okabe and Ito's colours, which colour-blind readers tell apart too; line styles and markers say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
WIDTH = 4.4  # inches
INTERVALS = f"{100 * INTERVAL[0]:g} to {100 * INTERVAL[1]:g}%"
LAYER = "decoder layer (the first is 0)"
_NUMBERED = 12  # cells on a side up to which a matrix shows its figures
_SIZE = 9  # of text, points: 11 pixels where the picture is 390 wide


def headed(
    analysis: Analysis, title: str, height: float, rows: int = 1, columns: int = 1, *, note: str = "", **options: Any
) -> tuple[Any, Any]:
    """Make a figure that says what it shows, of which model, and from how many samples; warns where they are few.

    Args:
        analysis: what is drawn.
        title: what the picture shows.
        height: of the picture, inches.
        rows: of plots.
        columns: of plots.
        note: what else a reader must know.
        **options: of `matplotlib.figure.Figure.subplots`.

    Returns:
        The figure, and its axes [rows, columns].
    """
    stats = analysis.stats
    model = str(stats.provenance.get("model") or stats.model.model_type)
    sources = ", ".join(f"{name} {len(part)}" for name, part in analysis.sources.items())
    of = f" ({sources})" if len(analysis.sources) > 1 else ""
    facts = [f"{model.rstrip('/').rpartition('/')[2]}, {plural(len(stats), 'sample')}{of}"]
    if few := len(stats) < FEW:
        title = f"Only {plural(len(stats), 'sample')}: {title}"
        facts.append(f"Fewer than {FEW} samples: this describes them as much as the model.")
    figure, axes = canvas(WIDTH, height, rows, columns, squeeze=False, **options)
    lines = textwrap.wrap(title, 44)
    figure.suptitle("\n".join(lines), x=0.02, ha="left", fontsize=11, fontweight="bold")
    below = "\n".join(line for text in [*facts, note] for line in textwrap.wrap(text, 72))
    figure.supxlabel(below.replace("$", r"\$"), x=0.02, ha="left", fontsize=8, color="black" if few else "#565d66")
    return figure, axes


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
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def style(axes: Any, title: str, below: str, beside: str) -> None:
    """Title a plot and its axes, `below` and `beside` it, and draw its grid."""
    axes.set_title(title, fontsize=_SIZE, loc="left")
    axes.set_xlabel(below, fontsize=_SIZE)
    axes.set_ylabel(beside, fontsize=_SIZE)
    axes.tick_params(labelsize=_SIZE)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if below.startswith(("decoder", "image")):  # numbered, not measured
        axes.xaxis.get_major_locator().set_params(integer=True)


def legend_above(axes: Any, title: str = "", columns: int = 2) -> None:
    """Put the legend of a plot above its title, where it covers nothing."""
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles, [name.replace("$", r"\$") for name in names], title=title or None, title_fontsize=_SIZE,
        alignment="left", frameon=False, fontsize=_SIZE, ncols=columns, columnspacing=1.2, borderpad=0,
        loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=2.2,
    )  # fmt: skip


def numbers(axes: Any, image: Any, matrix: torch.Tensor, form: str) -> None:
    """Write each value into its cell, where there are few; dark on light and light on dark."""
    if len(matrix) > _NUMBERED:
        return
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            if value == value:
                colour = "black" if image.norm(value) > 0.55 else "white"
                axes.text(column, row, form.format(value), ha="center", va="center", fontsize=8, color=colour)


def percent(fraction: float) -> str:
    """Write a fraction as percent: "40%"."""
    return f"{100 * fraction:g}%"


def span_of(values: torch.Tensor, form: str) -> str:
    """Write the least and the greatest value: "0.10 to 0.81"; nothing for none."""
    if not values.numel():
        return ""
    least, most = form.format(float(values.min())), form.format(float(values.max()))
    return least if least == most else f"{least} to {most}"


def listed(texts: list[str]) -> str:
    """Join texts: "a, b and c"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
