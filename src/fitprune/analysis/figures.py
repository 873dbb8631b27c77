"""Pictures of what `analyze` found, each as PNG and SVG. Needs matplotlib (extra `figures`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fitprune._support.plots import canvas, save_figure
from fitprune.analysis.analyze import Analysis
from fitprune.analysis.attention import KINDS, PositionBias, RankAgreement
from fitprune.analysis.drawing import (
    BLUES,
    COLOURS,
    LAYER,
    WIDTH,
    band,
    legend_below,
    legend_beside,
    line,
    numbers,
    percent,
    style,
)
from fitprune.analysis.spread import INTERVAL, Spread

_INTERVAL = f"{100 * INTERVAL[0]:g} to {100 * INTERVAL[1]:g}%"


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
        "tolerance_curve": lambda: _tolerance_curve(analysis),
        "removals": lambda: _removals(analysis),
        "attention_loss": lambda: _attention_loss(analysis),
        "stability_over_size": lambda: _stability_over_size(analysis),
        "stability_over_size_by_layer": lambda: _stability_by_layer(analysis),
    }
    ranks, position = analysis.ranks, analysis.position
    if analysis.data:
        pictures["stability_over_data"] = lambda: _stability_over_data(analysis)
    if ranks is not None:
        pictures["rank_agreement"] = lambda: _rank_agreement(ranks)
    if position is not None:
        pictures["position_bias"] = lambda: _position_bias(position)
    written = []
    for name, draw in pictures.items():
        figure = draw()
        for ending in ("png", "svg"):
            written.append(Path(folder) / f"{name}.{ending}")
            save_figure(figure, written[-1])
    return written


def _received_attention(analysis: Analysis) -> Any:
    figure, row = canvas(WIDTH, 2.8, 1, 2)
    spreads = (analysis.layers.self_attention, analysis.layers.cross_attention)
    for axes, kind, spread in zip(row, KINDS, spreads, strict=False):
        band(axes, range(len(spread.mean)), spread, 0, "mean over samples", f"{_INTERVAL} of samples")
        style(axes, f"{kind} attention", LAYER, "received by all visual tokens\n(sum; maximum over heads)")
        axes.set_ylim(bottom=0)
    legend_below(figure, row[0])
    return figure


def _top_share(analysis: Analysis) -> Any:
    top = analysis.top_share
    figure, row = canvas(WIDTH, 2.8, 1, 2, sharey=True)
    for axes, kind, spread in zip(row, KINDS, (top.self_attention, top.cross_attention), strict=False):
        for number, fraction in enumerate(top.fractions):
            part = Spread(*(values[number] for values in vars(spread).values()))
            band(axes, range(part.mean.shape[0]), part, number, f"{100 * fraction:g}%")
        style(axes, f"{kind} attention", LAYER, "")
        axes.set_ylim(0, 1)
    row[0].set_ylabel("share of the attention received", fontsize=9)
    # The upper lines first, as they lie.
    handles, names = row[1].get_legend_handles_labels()
    figure.legend(
        handles[::-1], names[::-1], title=f"held by the top\n(band: {_INTERVAL}\nof samples)", frameon=False,
        fontsize=8, title_fontsize=8, loc="outside right center",
    )  # fmt: skip
    return figure


def _tolerance_curve(analysis: Analysis) -> Any:
    curve = analysis.tolerance
    figure, axes = canvas(4.6, 3.2)
    axes.fill_between(
        curve.tolerances, curve.by_sample.low.tolist(), curve.by_sample.high.tolist(),
        color=COLOURS[0], alpha=0.2, linewidth=0, label=f"FLOPs, {_INTERVAL} of single samples",
    )  # fmt: skip
    axes.plot(curve.tolerances, curve.flops_reduction.tolist(), color=COLOURS[0], label="FLOPs, all samples")
    axes.plot(
        curve.tolerances, curve.kv_cache_reduction.tolist(), "--", color=COLOURS[1], label="KV bytes, all samples"
    )
    fitted = [part.recipe.provenance["tolerance"] for part in analysis.budgets]
    reached = [part.recipe.provenance["reached"] for part in analysis.budgets]
    axes.plot(fitted, reached, "D", color="black", markersize=5, label="fitted recipes, FLOPs")
    style(axes, "", "tolerance (share of attention that a layer may lose)", "removed (fraction of the visual tokens')")
    axes.set(xlim=(0, 1), ylim=(0, 1.005))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _removals(analysis: Analysis) -> Any:
    figure, row = canvas(WIDTH, 2.8, 1, 2)
    n, budgets = analysis.budgets[0].recipe.visual_tokens, analysis.budgets
    width = 0.8 / len(budgets)
    for number, part in enumerate(budgets):
        name, colour = percent(part.flops_reduction), COLOURS[number % len(COLOURS)]
        removed, kept = part.recipe.counts(n), part.recipe.kept(n)
        where = [layer + (number - (len(budgets) - 1) / 2) * width for layer in range(len(removed))]
        row[0].bar(where, removed, width, color=colour, label=name)
        row[1].plot(kept, color=colour, **line(number, len(kept)), label=name)
    row[0].set_yscale("symlog", linthresh=1)  # one layer takes a hundred tokens, others one
    row[0].set_ylim(0, n)
    ticks = [0, *(10**power for power in range(math.ceil(math.log10(n))) if 2 * 10**power < n), n]
    row[0].set_yticks(ticks, [str(tick) for tick in ticks])
    row[0].minorticks_off()
    style(row[0], "", LAYER, "tokens removed at the layer (log)")
    style(row[1], "", LAYER, "tokens present after the layer")
    row[1].set_ylim(0, n)
    row[1].legend(title="FLOPs cut", frameon=False, fontsize=8, title_fontsize=8)
    return figure


def _attention_loss(analysis: Analysis) -> Any:
    figure, row = canvas(WIDTH, 2.6, 1, 2, sharey=True)
    for number, part in enumerate(analysis.budgets):
        for axes, lost in zip(row, (part.lost_self.tolist(), part.lost_cross.tolist()), strict=True):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(lost, color=colour, **line(number, len(lost)), label=percent(part.flops_reduction))
    style(row[0], "self attention", LAYER, "share lost (mean over samples)")
    style(row[1], "cross attention", LAYER, "")
    row[0].set_ylim(bottom=0)
    legend_beside(figure, row[1], "FLOPs cut")
    return figure


def _stability_over_size(analysis: Analysis) -> Any:
    figure, row = canvas(WIDTH, 2.8, 1, 2)
    sizes = sorted({part.samples for part in analysis.sizes})
    for number, budget in enumerate(analysis.budgets):
        parts = [part for part in analysis.sizes if part.flops_reduction == budget.flops_reduction]
        colour = COLOURS[number % len(COLOURS)]
        where = [at + 0.12 * (number - (len(analysis.budgets) - 1) / 2) for at in range(len(sizes))]  # side by side
        for axes, spreads, origin in (
            (row[0], [part.distance for part in parts], 0.0),
            (row[1], [part.attention_loss for part in parts], budget.attention_loss),
        ):
            mean, low, high = (
                torch.stack([getattr(spread, name) for spread in spreads]) - origin for name in ("mean", "low", "high")
            )
            # A mean may lie outside of the interval: then the bar ends at it.
            error = torch.stack([mean - low, high - mean]).clamp(min=0)
            axes.errorbar(
                where,
                mean.tolist(),
                error.tolist(),
                color=colour,
                capsize=3,
                **line(number, 1),
                label=percent(budget.flops_reduction),
            )
    style(row[0], "", "samples drawn", "distance to the recipe of all samples\n(tokens per layer)")
    style(row[1], "", "samples drawn", "share of attention lost, beyond\nthat of the recipe of all samples")
    for axes in row:
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
    row[0].set_ylim(bottom=0)
    row[1].axhline(0, color="black", linewidth=0.6)
    legend_beside(figure, row[1], f"FLOPs cut\n(bar: {_INTERVAL}\nof {analysis.resamples} draws)")
    return figure


def _stability_by_layer(analysis: Analysis) -> Any:
    budgets = analysis.budgets
    figure, grid = canvas(WIDTH, 2.8, 1, len(budgets), sharey=True, squeeze=False)
    for axes, budget in zip(grid[0], budgets, strict=True):
        parts = [part for part in analysis.sizes if part.flops_reduction == budget.flops_reduction]
        kept = torch.tensor(budget.recipe.kept(budget.recipe.visual_tokens))
        for number, part in enumerate(parts):  # the fewest samples first: their band is the widest
            colour = BLUES[min(number + len(BLUES) - len(parts), len(BLUES) - 1)]
            axes.fill_between(
                range(len(kept)), (part.kept.low - kept).tolist(), (part.kept.high - kept).tolist(),
                color=colour, linewidth=0, label=f"{part.samples} samples",
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        style(axes, f"FLOPs cut {percent(budget.flops_reduction)}", "decoder layer", "")
    grid[0][0].set_ylabel("tokens present, beyond those\nof the recipe of all samples", fontsize=9)
    legend_beside(figure, grid[0][-1], f"{_INTERVAL}\nof {analysis.resamples} draws")
    return figure


def _stability_over_data(analysis: Analysis) -> Any:
    data = analysis.data
    figure, grid = canvas(WIDTH, 4.6, 2, len(data), squeeze=False, sharey="row")
    n = analysis.budgets[0].recipe.visual_tokens
    most = max(float(part.attention_loss.max()) for part in data)
    for column, part in enumerate(data):
        for number, (name, kept) in enumerate(zip(part.names, part.kept.tolist(), strict=True)):
            grid[0][column].plot(kept, color=COLOURS[number % len(COLOURS)], **line(number, len(kept)), label=name)
        style(grid[0][column], f"FLOPs cut {percent(part.flops_reduction)}", "decoder layer", "")
        grid[0][column].set_ylim(0, n)
        axes = grid[1][column]
        image = axes.imshow(part.attention_loss.numpy(), cmap="cividis", vmin=0, vmax=most)
        numbers(axes, image, part.attention_loss, "{:.3f}")
        places = range(len(part.names))
        axes.set_xticks(places, part.names, fontsize=8, rotation=20, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, part.names, fontsize=8)
        axes.set_xlabel("share of attention lost on", fontsize=9)
    grid[0][0].set_ylabel("tokens present after the layer", fontsize=9)
    grid[1][0].set_ylabel("recipe fitted on", fontsize=9)
    grid[0][-1].legend(frameon=False, fontsize=8)
    return figure


def _rank_agreement(ranks: RankAgreement) -> Any:
    figure, axes = canvas(4.4, 3.8)
    least = float(ranks.matrix.nan_to_num(0).min())
    image = axes.imshow(ranks.matrix.numpy(), cmap="cividis", vmin=min(0.0, least), vmax=1)
    numbers(axes, image, ranks.matrix, "{:.2f}")
    axes.set_xlabel(LAYER, fontsize=9)
    axes.set_ylabel("decoder layer", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("rank correlation of token scores\n(Spearman, mean over samples)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _position_bias(position: PositionBias) -> Any:
    from matplotlib.colors import LogNorm

    figure, grid = canvas(WIDTH, 4.8, 2, 3, height_ratios=(1.2, 1))
    every = torch.stack(list(position.grid.values()))
    # As far above the mean token as below it, so that white is the mean; beyond eightfold the colour is full.
    reach = min(max(float(every.max()), 1 / max(float(every.min()), 1e-6), 2.0), 8.0)
    for column, kind in enumerate(KINDS):
        upper, lower = grid[0][column], grid[1][column]
        relative = position.grid[kind].clamp(1 / reach, reach)
        image = upper.imshow(relative.numpy(), cmap="PuOr_r", norm=LogNorm(1 / reach, reach))
        upper.set_title({"score": "score (self x cross)"}.get(kind, f"{kind} attention"), fontsize=9)
        upper.tick_params(labelsize=8)
        for axis in (upper.xaxis, upper.yaxis):
            axis.get_major_locator().set_params(integer=True)
        for number, (name, values) in enumerate((("row", position.by_row[kind]), ("column", position.by_column[kind]))):
            spread = Spread(values.mean(0), values.std(0, correction=0), values.amin(0), values.amax(0))
            band(lower, range(position.side), spread, number, f"by {name}, mean of layers (band: least and most)")
        lower.axhline(1, color="black", linewidth=0.6)
        upper.set_xlabel("image column", fontsize=9)
        style(lower, "", "image row or column", "")
        lower.set_ylim(bottom=0)
    grid[0][0].set_ylabel("image row", fontsize=9)
    grid[1][0].set_ylabel("relative to the mean token", fontsize=9)
    legend_below(figure, grid[1][2])
    ticks = [2.0**power for power in range(-3, 4) if 1 / reach <= 2.0**power <= reach]
    bar = figure.colorbar(image, ax=list(grid[0]), shrink=0.9, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:g}x" for tick in ticks], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label("relative to the mean token", fontsize=9)
    return figure
