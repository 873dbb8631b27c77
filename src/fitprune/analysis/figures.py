"""Pictures of what `analyze` found, each as PNG and SVG. Needs matplotlib (extra `figures`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fitprune._support.plots import save_figure
from fitprune.analysis import stability_figures
from fitprune.analysis.analyze import Analysis
from fitprune.analysis.attention import KINDS, PositionBias, RankAgreement
from fitprune.analysis.drawing import INTERVALS, LAYER, band, headed, legend_above, numbers, percent, span_of, style
from fitprune.analysis.spread import Spread


def draw_analysis(analysis: Analysis, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every part that the analysis has, as PNG and as SVG.

    Args:
        analysis: what `analyze` found.
        folder: is made if it is missing.

    Returns:
        The files written.

    Raises:
        OSError: `folder` cannot be written.
        ImportError: matplotlib is not installed.
    """
    pictures: dict[str, Callable[[], Any]] = {
        "received_attention": lambda: _received_attention(analysis),
        "top_share": lambda: _top_share(analysis),
        "tolerance_curve": lambda: stability_figures.tolerance_curve(analysis),
        "removals": lambda: stability_figures.removals(analysis),
        "attention_loss": lambda: stability_figures.attention_loss(analysis),
        "stability_over_size": lambda: stability_figures.stability_over_size(analysis),
        "stability_over_size_by_layer": lambda: stability_figures.stability_by_layer(analysis),
    }
    ranks, position = analysis.ranks, analysis.position
    if analysis.data:
        pictures["stability_over_data"] = lambda: stability_figures.stability_over_data(analysis)
    if ranks is not None:
        pictures["rank_agreement"] = lambda: _rank_agreement(analysis, ranks)
    if position is not None:
        pictures["position_bias"] = lambda: _position_bias(analysis, position)
    written = []
    for name, draw in pictures.items():
        figure = draw()
        for ending in ("png", "svg"):
            written.append(Path(folder) / f"{name}.{ending}")
            save_figure(figure, written[-1])
    return written


def _received_attention(analysis: Analysis) -> Any:
    spreads = (analysis.layers.self_attention, analysis.layers.cross_attention)
    peaks = [int(spread.mean.argmax()) for spread in spreads]
    title = f"Visual tokens receive most self attention in layer {peaks[0]}, most cross attention in layer {peaks[1]}"
    figure, grid = headed(analysis, title, 5.4, 2, sharex=True)
    for axes, kind, spread in zip(grid[:, 0], KINDS, spreads, strict=False):
        band(axes, range(len(spread.mean)), spread, 0, "mean over samples", f"{INTERVALS} of samples")
        style(axes, f"{kind} attention, sum over all visual tokens", LAYER, "")
        axes.set_ylim(bottom=0)
    grid[0, 0].set_xlabel("")
    legend_above(grid[0, 0])
    return figure


def _top_share(analysis: Analysis) -> Any:
    top = analysis.top_share
    tenth = min(range(len(top.fractions)), key=lambda at: abs(top.fractions[at] - 0.1))
    ranges = [span_of(100 * spread.mean[tenth], "{:.0f}") for spread in (top.self_attention, top.cross_attention)]
    title = (
        f"The top {percent(top.fractions[tenth])} of the tokens hold {ranges[0]}% of the self attention, {ranges[1]}% "
        "of the cross attention"
    )
    figure, grid = headed(analysis, title, 6.2, 2, sharex=True)
    for axes, kind, spread in zip(grid[:, 0], KINDS, (top.self_attention, top.cross_attention), strict=False):
        for number, fraction in enumerate(top.fractions):
            part = Spread(*(values[number] for values in vars(spread).values()))
            band(axes, range(part.mean.shape[0]), part, number, percent(fraction))
        style(axes, f"share of the {kind} attention received", LAYER, "")
        axes.set_ylim(0, 1)
    grid[0, 0].set_xlabel("")
    legend_above(grid[0, 0], f"held by the top (band: {INTERVALS} of samples)", len(top.fractions))
    return figure


def _rank_agreement(analysis: Analysis, ranks: RankAgreement) -> Any:
    matrix = ranks.matrix
    apart = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    spread = span_of(apart[~apart.isnan()], "{:.2f}")
    title = f"The token scores of two layers correlate by {spread}" if spread else "Rank agreement between layers"
    figure, grid = headed(
        analysis, title, 4.9, note="Spearman's rank correlation of scores (self x cross), mean over samples."
    )
    axes = grid[0, 0]
    image = axes.imshow(matrix.numpy(), cmap="cividis", vmin=min(0.0, float(matrix.nan_to_num(0).min())), vmax=1)
    numbers(axes, image, matrix, "{:.2f}")
    style(axes, "", LAYER, "decoder layer")
    axes.grid(visible=False)
    axes.yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9)
    bar.ax.tick_params(labelsize=9)
    return figure


def _position_bias(analysis: Analysis, position: PositionBias) -> Any:
    from matplotlib.colors import LogNorm

    rows = [values.mean(0) for values in position.by_row.values()]
    top, bottom = ([f"{float(values[at]):.2g}x" for values in rows[:2]] for at in (0, -1))
    title = (
        f"Self attention is {top[0]} the mean token in the top row, {bottom[0]} in the bottom row; cross attention "
        f"{top[1]} and {bottom[1]}"
    )
    note = "Pictures of one layout show that layout here too, however many they are."
    figure, grid = headed(analysis, title, 7.6, 3, 2, note=note)
    every = torch.stack(list(position.grid.values()))
    # As far above the mean token as below it, so that white is the mean.
    reach = min(max(float(every.max()), 1 / max(float(every.min()), 1e-6), 2.0), 64.0)
    for kind, (left, right) in zip(KINDS, grid, strict=True):
        relative = position.grid[kind].clamp(1 / reach, reach)
        image = left.imshow(relative.numpy(), cmap="PuOr_r", norm=LogNorm(1 / reach, reach))
        style(left, {"score": "score (self x cross)"}.get(kind, f"{kind} attention"), "image column", "image row")
        left.grid(visible=False)
        left.yaxis.get_major_locator().set_params(integer=True)
        for number, (name, values) in enumerate((("row", position.by_row[kind]), ("column", position.by_column[kind]))):
            spread = Spread(values.mean(0), values.std(0, correction=0), values.amin(0), values.amax(0))
            band(right, range(position.side), spread, number, f"by {name}")
        right.axhline(1, color="black", linewidth=0.6)
        style(right, "mean of layers (band: all)", "image row or column", "")
        right.set_ylim(bottom=0)
    legend_above(grid[0, 1])
    ticks = [4.0**power for power in range(-3, 4) if 1 / reach <= 4.0**power <= reach]
    bar = figure.colorbar(image, ax=list(grid[:, 0]), location="bottom", ticks=ticks, shrink=0.9)
    bar.ax.set_xticklabels([f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}" for tick in ticks], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label("times the mean token", fontsize=9)
    return figure
