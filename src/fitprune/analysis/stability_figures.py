"""Pictures of how firmly statistics fix a recipe. Needs matplotlib (extra `figures`)."""

from __future__ import annotations

from typing import Any

import torch

from fitprune.analysis.analyze import Analysis
from fitprune.analysis.drawing import (
    COLOURS,
    INTERVALS,
    LAYER,
    MARKERS,
    headed,
    legend_above,
    line,
    listed,
    percent,
    span_of,
    style,
)

_NUMBERED = 16  # layers up to which bars carry their figures


def tolerance_curve(analysis: Analysis) -> Any:
    """Draw what each tolerance removes."""
    curve = analysis.tolerance
    shares = {at: float(curve.flops_reduction[curve.tolerances.index(at)]) for at in (0.2, 0.8)}
    title = "; ".join(f"a tolerance of {at:g} removes {100 * share:.0f}% of the FLOPs" for at, share in shares.items())
    figure, grid = headed(analysis, title[0].upper() + title[1:], 5.0)
    axes = grid[0, 0]
    axes.fill_between(
        curve.tolerances, curve.by_sample.low.tolist(), curve.by_sample.high.tolist(),
        color=COLOURS[0], alpha=0.2, linewidth=0, label=f"{INTERVALS} of single samples",
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
    legend_above(axes, columns=1)
    return figure


def removals(analysis: Analysis) -> Any:
    """Draw what each recipe leaves and removes, layer by layer."""
    n, budgets = analysis.budgets[0].recipe.visual_tokens, analysis.budgets
    left = [str(part.recipe.kept(n)[-1]) for part in budgets]
    title = f"Of {n} visual tokens {listed(left)} are left after the last layer"
    figure, grid = headed(
        analysis, title, 2.6 + 1.1 * len(budgets) + 1.6, 1 + len(budgets), sharex=True,
        height_ratios=[2, *[1] * len(budgets)],
    )  # fmt: skip
    most = max(max(part.recipe.counts(n)) for part in budgets)
    for number, part in enumerate(budgets):
        name, colour = percent(part.flops_reduction), COLOURS[number % len(COLOURS)]
        removed, kept = part.recipe.counts(n), part.recipe.kept(n)
        grid[0, 0].plot(kept, color=colour, **line(number, len(kept)), label=name)
        axes = grid[1 + number, 0]
        bars = axes.bar(range(len(removed)), removed, 0.8, color=colour)
        if len(removed) <= _NUMBERED:
            axes.bar_label(bars, fontsize=8)
        style(axes, f"removed at the layer, {name} of FLOPs cut", "", "")
        axes.set_ylim(0, 1.25 * most)
    style(grid[0, 0], "present after the layer", "", "")
    grid[0, 0].set_ylim(0, n)
    grid[-1, 0].set_xlabel(LAYER, fontsize=9)
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    legend_above(grid[0, 0], "FLOPs cut", len(budgets))
    return figure


def attention_loss(analysis: Analysis) -> Any:
    """Draw what each recipe loses of the attention, layer by layer."""
    losses = listed([f"{100 * part.attention_loss:.0f}%" for part in analysis.budgets])
    budgets = listed([percent(part.flops_reduction) for part in analysis.budgets])
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
    legend_above(grid[0, 0], "FLOPs cut", len(analysis.budgets))
    return figure


def stability_over_size(analysis: Analysis) -> Any:
    """Draw how far recipes from few samples lie from those of all, and what they lose."""
    sizes = sorted({part.samples for part in analysis.sizes})
    first = [float(part.distance.mean) for part in analysis.sizes if part.samples == sizes[0]]
    apart = span_of(torch.tensor(first), "{:.1f}")
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
    legend_above(grid[0, 0], f"FLOPs cut (bar: {INTERVALS} of {analysis.resamples} draws)", len(analysis.budgets))
    return figure


def _unreached(analysis: Analysis) -> str:
    """Say which sizes are missing."""
    return next((note for note in analysis.notes if note.startswith("calibration sizes")), "")


def stability_by_layer(analysis: Analysis) -> Any:
    """Draw at which layers recipes from few samples differ."""
    budgets = analysis.budgets
    title = f"Where recipes from few samples differ from those of all {len(analysis.stats)}"
    figure, grid = headed(
        analysis, title, 1.8 + 1.5 * len(budgets), len(budgets), sharex=True, sharey=True, note=_unreached(analysis)
    )
    for axes, budget in zip(grid[:, 0], budgets, strict=True):
        parts = [part for part in analysis.sizes if part.flops_reduction == budget.flops_reduction]
        kept = torch.tensor(budget.recipe.kept(budget.recipe.visual_tokens))
        for number, part in enumerate(parts):
            low, high = (part.kept.low - kept).tolist(), (part.kept.high - kept).tolist()
            looks = {"color": COLOURS[number % len(COLOURS)], **line(number, len(kept))}
            axes.fill_between(range(len(kept)), low, high, color=looks["color"], alpha=0.15, linewidth=0)
            axes.plot(low, **looks)
            axes.plot(high, **looks, label=f"{part.samples}")
        axes.axhline(0, color="black", linewidth=0.8)
        style(axes, f"tokens present, beyond those of all, {percent(budget.flops_reduction)} cut", "", "")
    grid[-1, 0].set_xlabel(LAYER, fontsize=9)
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    legend_above(grid[0, 0], f"samples drawn (band: {INTERVALS} of {analysis.resamples} draws)", 4)
    return figure


def stability_over_data(analysis: Analysis) -> Any:
    """Draw the recipes of each data, and what each loses on each data."""
    data, n = analysis.data, analysis.budgets[0].recipe.visual_tokens
    most = max(float(part.distance.max()) for part in data)
    title = f"Recipes of {listed(list(data[0].names))} lie at most {most:.1f} tokens a layer apart"
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
