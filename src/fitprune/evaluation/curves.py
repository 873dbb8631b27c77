"""The charts of a report: accuracy against FLOPs, and visual tokens against layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fitprune._support.charts import NARROW, Axis, Series, legend_of, lines, steps
from fitprune._support.page import Html, escape
from fitprune.evaluation.summary import DENSE, Row, Task, label

OURS = "fitprune"
RECIPES = "recipes"  # the line of all recipes of no stated budget
TOGETHER = 7  # methods that one chart holds; more get a small chart each
HANDFUL = 5  # recipes whose layers are drawn
SMALL = 171  # pixels; two stand side by side in a window of 390


def accuracy_curves(rows: Sequence[Row], task: Task) -> Html:
    """Draw accuracy, or agreement if accuracies compare nothing, against FLOPs: a line for each method.

    Of many methods each gets a chart of its own, with FitPrune's line in all.

    Args:
        rows: the task's.
        task: what they are of.
    """
    dense = next(_height(row, task)[0] for row in rows if row.method == DENSE)
    series = [_curve(rows, name, look, task) for name, look in _looks(rows).items()]
    name = task.figure if task.comparable else "agreement with dense"
    unit = f"% of {task.maximum:g}" if task.comparable and task.benchmark and task.maximum != 100 else "%"
    title, level = f"{name[:1].upper()}{name[1:]} by FLOPs removed, {task.name}", (f"dense {dense:.1f}", dense)
    marks = sorted({100 * row.budget for row in rows if row.budget is not None})
    x = Axis("FLOPs of visual tokens removed, %", unit="%", marks=marks)
    y = Axis(f"{name}, {unit}", unit="%")
    if len(series) <= TOGETHER:
        return lines(series, title, x, y, level=level)
    heights = [dense, *(end for each in series for ends in each.spread for end in ends)]
    across = [*marks, *(at for each in series for at, _ in each.points)]
    shared_x = Axis("", *_around(across), unit="%", marks=marks)
    shared_y = Axis("", *_around(heights), unit="%")
    ours = next((each for each in series if each.name == OURS), None)
    charts = [
        lines(
            [each] if ours in (None, each) else [Series(OURS, ours.points, 0), each],
            each.name, shared_x, shared_y, level=level, wide=SMALL, narrow=SMALL, height=110, legend=False,
        )
        for each in series
    ]  # fmt: skip
    note = f"{title}. Across: {x.name}. Up: {y.name}. Thick: {OURS}. Dotted: {level[0]}."
    return Html(f"<p class=small>{escape(note)}</p><div class='row charts'>{''.join(charts)}</div>")


def keep_curves(rows: Sequence[Row], recipes: Mapping[str, Any]) -> Html:
    """Draw the share of visual tokens that enters each layer: a chart for each budget, or, of many methods, for each.

    Recipes of no stated budget have a chart of their own, with a few of them.

    Args:
        rows: the rows of all tasks.
        recipes: label -> the recipe's JSON data.
    """
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    chosen = [budget for budget in budgets if budget in (0.4, 0.6, 0.8)]
    titles = {at: f"{100 * at:g}% of FLOPs removed" for at in chosen or budgets[:3]}
    methods = _looks([row for row in rows if not row.is_recipe])
    charts: dict[str, list[Series]] = {}
    for at, title in titles.items():
        for method, look in methods.items():
            if (recipe := recipes.get(label(method, at))) is None:
                continue
            if len(methods) <= TOGETHER:
                charts.setdefault(title, []).append(_entering(recipe, method, look))
            else:
                charts.setdefault(method, []).append(_entering(recipe, title, 1 + list(titles).index(at)))
    x, y = Axis("decoder layer (the first is 0)", whole=True), Axis("visual tokens that enter, %", 0, 100, "%")
    looks, (wide, narrow, height) = methods, (NARROW, NARROW, 220)
    if len(methods) > TOGETHER:
        x, y = Axis("", whole=True), Axis("", 0, 100, "%")
        looks = {title: 1 + at for at, title in enumerate(titles.values())}
        wide, narrow, height = SMALL, SMALL, 90
    drawn = "".join(
        steps(series, title, x, y, legend=False, wide=wide, narrow=narrow, height=height)
        for title, series in charts.items()
    )
    legend = legend_of([Series(name, (), look) for name, look in looks.items()]) if charts else ""
    cuts = {row.label: row.flops_reduction for row in rows if row.is_recipe and row.label in recipes}
    some = spread(cuts, HANDFUL)
    title = f"{len(some)} of {len(cuts)} recipes" if len(some) < len(cuts) else "Recipes"
    x, y = Axis("decoder layer (the first is 0)", whole=True), Axis("visual tokens that enter, %", 0, 100, "%")
    own = [_entering(recipes[name], name, 1 + at) for at, name in enumerate(some)]
    return Html(f"<div class='row charts'>{drawn}</div>{legend}{steps(own, title, x, y) if own else ''}")


def spread(cuts: Mapping[str, float], most: int) -> list[str]:
    """Choose names that are spread over the FLOPs that each removes, from the least to the most.

    Args:
        cuts: name -> fraction of FLOPs removed.
        most: how many names, more than one.
    """
    names = sorted(cuts, key=lambda name: cuts[name])
    if len(names) <= most:
        return names
    return [names[round(at * (len(names) - 1) / (most - 1))] for at in range(most)]


def line_of(row: Row) -> str:
    """Name the line of a curve that a row is on."""
    return RECIPES if row.is_recipe else row.method


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Give the ends of an axis with some room beside the values."""
    pad = 0.04 * (max(values) - min(values)) or 1.0
    return min(values) - pad, max(values) + pad


def _entering(recipe: Mapping[str, Any], name: str, look: int) -> Series:
    shares = recipe.get("enter") or [1.0, *recipe["keep"][:-1]]
    return Series(name, [(layer, 100 * share) for layer, share in enumerate(shares)], look)


def _looks(rows: Sequence[Row]) -> dict[str, int]:
    """Give each method its look, the same in every chart of the page; FitPrune's is the strongest."""
    names = list(dict.fromkeys(line_of(row) for row in rows if row.method != DENSE))
    others = [name for name in names if name != OURS]
    return {name: 0 if name == OURS else 1 + others.index(name) for name in names}


def _curve(rows: Sequence[Row], name: str, look: int, task: Task) -> Series:
    own = sorted((100 * row.flops_reduction, *_height(row, task)) for row in rows if line_of(row) == name)
    return Series(name, [(x, y) for x, y, _ in own], look, [spread for *_, spread in own])


def _height(row: Row, task: Task) -> tuple[float, tuple[float, float]]:
    """Compute the point of a row and its interval, in percent."""
    if row.accuracy is None or row.accuracy_interval is None or not task.comparable:
        return 100 * row.agreement, (100 * row.agreement, 100 * row.agreement)
    low, high = row.accuracy_interval
    return 100 * row.accuracy, (100 * low, 100 * high)
