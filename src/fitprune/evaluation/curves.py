"""The charts of a report: accuracy against FLOPs, and visual tokens against layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fitprune._support.charts import NARROW, Axis, Series, legend_of, lines, steps
from fitprune._support.page import Html, escape
from fitprune.evaluation.summary import DENSE, Row, Task, label

OURS = "fitprune"
TOGETHER = 7  # methods that one chart holds; more get a small chart each
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
    title, level = f"{name[:1].upper()}{name[1:]} at each budget, {task.name}", (f"dense {dense:.1f}", dense)
    x, y = Axis("FLOPs of visual tokens removed, %", unit="%"), Axis(f"{name}, {unit}", unit="%")
    if len(series) <= TOGETHER:
        return lines(series, title, x, y, level=level)
    heights = [dense, *(height for each in series for _, height in each.points)]
    pad = 0.03 * (max(heights) - min(heights)) or 1.0
    shared = Axis("", min(heights) - pad, max(heights) + pad, unit="%")
    ours = next((each for each in series if each.name == OURS), None)
    charts = [
        lines(
            [each] if ours in (None, each) else [Series(OURS, ours.points, 0), each],
            each.name, Axis("", unit="%"), shared, level=level, wide=SMALL, narrow=SMALL, height=110, legend=False,
        )
        for each in series
    ]  # fmt: skip
    note = f"{title}. Across: {x.name}. Up: {y.name}. Thick: {OURS}. Dotted: {level[0]}."
    return Html(f"<p class=small>{escape(note)}</p><div class='row charts'>{''.join(charts)}</div>")


def keep_curves(rows: Sequence[Row], recipes: Mapping[str, Any]) -> Html:
    """Draw the share of visual tokens that enters each layer: a chart for each budget, or, of many methods, for each.

    Args:
        rows: the rows of all tasks.
        recipes: label -> the recipe's JSON data.
    """
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    chosen: list[float | None] = [budget for budget in budgets if budget in (0.4, 0.6, 0.8)]
    titles = {at: "Recipes" if at is None else _cut(at) for at in chosen or [*budgets[:3]] or [None]}
    methods = _looks(rows)
    charts: dict[str, list[Series]] = {}
    for at, title in titles.items():
        for method, look in methods.items():
            if (recipe := recipes.get(label(method, at))) is None:
                continue
            points = [(layer, 100 * share) for layer, share in enumerate(_entering(recipe))]
            if len(methods) <= TOGETHER:
                charts.setdefault(title, []).append(Series(method, points, look))
            else:
                charts.setdefault(method, []).append(Series(title, points, 1 + list(titles).index(at)))
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
    legend = legend_of([Series(name, (), look) for name, look in looks.items()])
    return Html(f"<div class='row charts'>{drawn}</div>{legend}")


def _cut(budget: float) -> str:
    return f"{100 * budget:g}% of FLOPs removed"


def _entering(recipe: Mapping[str, Any]) -> Sequence[float]:
    return recipe.get("enter") or [1.0, *recipe["keep"][:-1]]


def _looks(rows: Sequence[Row]) -> dict[str, int]:
    """Give each method its look, the same in every chart of the page; FitPrune's is the strongest."""
    names = list(dict.fromkeys(row.method for row in rows if row.method != DENSE))
    others = [name for name in names if name != OURS]
    return {name: 0 if name == OURS else 1 + others.index(name) for name in names}


def _curve(rows: Sequence[Row], name: str, look: int, task: Task) -> Series:
    own = sorted((100 * row.flops_reduction, *_height(row, task)) for row in rows if row.method == name)
    return Series(name, [(x, y) for x, y, _ in own], look, [spread for *_, spread in own])


def _height(row: Row, task: Task) -> tuple[float, tuple[float, float]]:
    """Compute the point of a row and its interval, in percent."""
    if row.accuracy is None or row.accuracy_interval is None or not task.comparable:
        return 100 * row.agreement, (100 * row.agreement, 100 * row.agreement)
    low, high = row.accuracy_interval
    return 100 * row.accuracy, (100 * low, 100 * high)
