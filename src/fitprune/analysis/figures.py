"""Pictures of what `analyze` found, each as PNG and SVG. Needs matplotlib (extra `figures`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fitprune._support.plots import save_figure
from fitprune.analysis.analyze import Analysis
from fitprune.analysis.attention import KINDS, PositionBias, RankAgreement
from fitprune.analysis.drawing import (
    BLUES,
    COLOURS,
    LAYER,
    MARKERS,
    band,
    headed,
    legend_above,
    line,
    numbers,
    percent,
    style,
)
from fitprune.analysis.spread import INTERVAL, Spread

_INTERVAL = f"{100 * INTERVAL[0]:g} to {100 * INTERVAL[1]:g}%"
_NUMBERED = 16  # layers up to which bars carry their figures


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
        band(axes, range(len(spread.mean)), spread, 0, "mean over samples", f"{_INTERVAL} of samples")
        style(axes, f"{kind} attention, sum over all visual tokens", LAYER, "")
        axes.set_ylim(bottom=0)
    grid[0, 0].set_xlabel("")
    legend_above(grid[0, 0])
    return figure


def _top_share(analysis: Analysis) -> Any:
    top = analysis.top_share
    tenth = min(range(len(top.fractions)), key=lambda at: abs(top.fractions[at] - 0.1))
    ranges = [_range(100 * spread.mean[tenth], "{:.0f}") for spread in (top.self_attention, top.cross_attention)]
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
    legend_above(grid[0, 0], f"held by the top (band: {_INTERVAL} of samples)", len(top.fractions))
    return figure


def _tolerance_curve(analysis: Analysis) -> Any:
    curve = analysis.tolerance
    shares = {at: float(curve.flops_reduction[curve.tolerances.index(at)]) for at in (0.2, 0.8)}
    title = "; ".join(f"a tolerance of {at:g} removes {100 * share:.0f}% of the FLOPs" for at, share in shares.items())
    figure, grid = headed(analysis, title[0].upper() + title[1:], 4.6)
    axes = grid[0, 0]
    axes.fill_between(
        curve.tolerances, curve.by_sample.low.tolist(), curve.by_sample.high.tolist(),
        color=COLOURS[0], alpha=0.2, linewidth=0, label=f"{_INTERVAL} of single samples",
    )  # fmt: skip
    axes.plot(curve.tolerances, curve.flops_reduction.tolist(), color=COLOURS[0], label="FLOPs, all samples")
    axes.plot(
        curve.tolerances, curve.kv_cache_reduction.tolist(), "--", color=COLOURS[1], label="KV bytes, all samples"
    )
    fitted = [part.recipe.provenance["tolerance"] for part in analysis.budgets]
    reached = [part.recipe.provenance["reached"] for part in analysis.budgets]
    axes.plot(fitted, reached, "D", color="black", markersize=5, label="fitted recipes, FLOPs")
    style(axes, "removed (fraction of the visual tokens')", "tolerance (share of attention a layer may lose)", "")
    axes.set(xlim=(0, 1), ylim=(0, 1.005))
    legend_above(axes)
    return figure


def _removals(analysis: Analysis) -> Any:
    n, budgets = analysis.budgets[0].recipe.visual_tokens, analysis.budgets
    left = [str(part.recipe.kept(n)[-1]) for part in budgets]
    title = f"Of {n} visual tokens {_listed(left)} are left after the last layer"
    figure, grid = headed(
        analysis, title, 2.6 + 1.1 * len(budgets) + 1.6, 1 + len(budgets), sharex=True,
        height_ratios=[2, *[1] * len(budgets)],
    )  # fmt: skip
    most = max(max(part.recipe.counts(n)) for part in budgets)
    for number, part in enumerate(budgets):
        name, colour = f"{percent(part.flops_reduction)} of FLOPs", COLOURS[number % len(COLOURS)]
        removed, kept = part.recipe.counts(n), part.recipe.kept(n)
        grid[0, 0].plot(kept, color=colour, **line(number, len(kept)), label=name)
        axes = grid[1 + number, 0]
        bars = axes.bar(range(len(removed)), removed, 0.8, color=colour)
        if len(removed) <= _NUMBERED:
            axes.bar_label(bars, fontsize=8)
        style(axes, f"removed at the layer, {name}", "", "")
        axes.set_ylim(0, 1.25 * most)
    style(grid[0, 0], "present after the layer", "", "")
    grid[0, 0].set_ylim(0, n)
    grid[-1, 0].set_xlabel(LAYER, fontsize=9)
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    legend_above(grid[0, 0], "cut", len(budgets))
    return figure


def _attention_loss(analysis: Analysis) -> Any:
    losses = _listed([f"{100 * part.attention_loss:.0f}%" for part in analysis.budgets])
    budgets = _listed([percent(part.flops_reduction) for part in analysis.budgets])
    figure, grid = headed(
        analysis,
        f"At a cut of {budgets} of the FLOPs, {losses} of the attention is lost",
        5.4,
        2,
        sharex=True,
        sharey=True,
    )
    for number, part in enumerate(analysis.budgets):
        for axes, lost in zip(grid[:, 0], (part.lost_self.tolist(), part.lost_cross.tolist()), strict=True):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(lost, color=colour, **line(number, len(lost)), label=percent(part.flops_reduction))
    style(grid[0, 0], "share of self attention lost, mean over samples", "", "")
    style(grid[1, 0], "share of cross attention lost, mean over samples", LAYER, "")
    grid[0, 0].set_ylim(bottom=0)
    legend_above(grid[0, 0], "cut of FLOPs", len(analysis.budgets))
    return figure


def _stability_over_size(analysis: Analysis) -> Any:
    sizes = sorted({part.samples for part in analysis.sizes})
    first = [float(part.distance.mean) for part in analysis.sizes if part.samples == sizes[0]]
    apart = _range(torch.tensor(first), "{:.1f}")
    title = f"Recipes from {sizes[0]} samples lie {apart} tokens a layer from those of all {len(analysis.stats)}"
    figure, grid = headed(analysis, title, 6.0, 2, sharex=True, note=_unreached(analysis))
    for number, budget in enumerate(analysis.budgets):
        parts = [part for part in analysis.sizes if part.flops_reduction == budget.flops_reduction]
        colour = COLOURS[number % len(COLOURS)]
        where = [at + 0.12 * (number - (len(analysis.budgets) - 1) / 2) for at in range(len(sizes))]  # side by side
        for axes, spreads, origin in (
            (grid[0, 0], [part.distance for part in parts], 0.0),
            (grid[1, 0], [part.attention_loss for part in parts], budget.attention_loss),
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
    style(grid[0, 0], "tokens a layer from the recipe of all samples", "", "")
    style(grid[1, 0], "share of attention lost beyond that of all samples", "samples drawn", "")
    for axes in grid[:, 0]:
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
    grid[0, 0].set_ylim(bottom=0)
    grid[1, 0].axhline(0, color="black", linewidth=0.6)
    legend_above(grid[0, 0], f"cut of FLOPs (bar: {_INTERVAL} of {analysis.resamples} draws)", len(analysis.budgets))
    return figure


def _unreached(analysis: Analysis) -> str:
    """Say which sizes are missing."""
    return next((note for note in analysis.notes if note.startswith("calibration sizes")), "")


def _stability_by_layer(analysis: Analysis) -> Any:
    budgets = analysis.budgets
    title = f"Where recipes from few samples differ from those of all {len(analysis.stats)}"
    figure, grid = headed(
        analysis, title, 1.8 + 1.5 * len(budgets), len(budgets), sharex=True, sharey=True, note=_unreached(analysis)
    )
    for axes, budget in zip(grid[:, 0], budgets, strict=True):
        parts = [part for part in analysis.sizes if part.flops_reduction == budget.flops_reduction]
        kept = torch.tensor(budget.recipe.kept(budget.recipe.visual_tokens))
        for number, part in enumerate(parts):  # the fewest samples first: their band is the widest
            colour = BLUES[min(number + len(BLUES) - len(parts), len(BLUES) - 1)]
            axes.fill_between(
                range(len(kept)), (part.kept.low - kept).tolist(), (part.kept.high - kept).tolist(),
                color=colour, linewidth=0, label=f"{part.samples}",
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        style(axes, f"tokens present, beyond those of all, {percent(budget.flops_reduction)} cut", "", "")
    grid[-1, 0].set_xlabel(LAYER, fontsize=9)
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    legend_above(grid[0, 0], f"samples drawn (band: {_INTERVAL} of {analysis.resamples} draws)", 4)
    return figure


def _stability_over_data(analysis: Analysis) -> Any:
    data, n = analysis.data, analysis.budgets[0].recipe.visual_tokens
    most = max(float(part.distance.max()) for part in data)
    title = f"Recipes of {_listed(list(data[0].names))} lie at most {most:.1f} tokens a layer apart"
    figure, grid = headed(analysis, title, 2.4 + 2.0 * len(data) + 0.5 * len(data) * len(data[0].names), 2 * len(data))
    for at, part in enumerate(data):
        upper, lower = grid[2 * at, 0], grid[2 * at + 1, 0]
        for number, (name, kept) in enumerate(zip(part.names, part.kept.tolist(), strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            upper.plot(kept, color=colour, **line(number, len(kept)), label=name)
            lost = part.attention_loss[number].tolist()  # of this recipe, on each data
            lower.plot(lost, range(len(lost)), MARKERS[number % len(MARKERS)], color=colour, alpha=0.8)
        style(upper, f"tokens present after the layer, {percent(part.flops_reduction)} cut", LAYER, "")
        upper.set_ylim(0, n)
        style(lower, f"share of attention lost on these data, {percent(part.flops_reduction)} cut", "", "")
        lower.set_yticks(range(len(part.names)), [name.replace("$", r"\$") for name in part.names])
        lower.set_ylim(len(part.names) - 0.5, -0.5)
    legend_above(grid[0, 0], "recipe fitted on")
    return figure


def _rank_agreement(analysis: Analysis, ranks: RankAgreement) -> Any:
    matrix = ranks.matrix
    apart = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    spread = _range(apart[~apart.isnan()], "{:.2f}")
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
    ends = [
        f"{values[0]:.1f}x the mean token in the top row, {values[-1]:.1f}x in the bottom row" for values in rows[:2]
    ]
    title = f"Self attention is {ends[0]}; cross attention {ends[1]}"
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
            band(right, range(position.side), spread, number, f"by {name}, mean of layers (band: least to most)")
        right.axhline(1, color="black", linewidth=0.6)
        style(right, "", "image row or column", "")
        right.set_ylim(bottom=0)
    legend_above(grid[0, 1], columns=1)
    ticks = [2.0**power for power in range(-6, 7) if 1 / reach <= 2.0**power <= reach]
    bar = figure.colorbar(image, ax=list(grid[:, 0]), location="bottom", ticks=ticks, shrink=0.9)
    bar.ax.set_xticklabels([f"{tick:g}" for tick in ticks], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label("times the mean token", fontsize=9)
    return figure


def _range(values: torch.Tensor, form: str) -> str:
    """Write the least and the greatest value: "0.10 to 0.81"; nothing for none."""
    if not values.numel():
        return ""
    least, most = form.format(float(values.min())), form.format(float(values.max()))
    return least if least == most else f"{least} to {most}"


def _listed(texts: list[str]) -> str:
    """Join texts: "a, b and c"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
