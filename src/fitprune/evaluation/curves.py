"""The curves of a report: accuracy against FLOPs, and tokens against layers. Needs matplotlib (extra `figures`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fitprune._support.plots import canvas, svg_text
from fitprune.evaluation.summary import DENSE, Row, Task, label

# Okabe and Ito's colours, which colour-blind readers can distinguish; a second round is dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")


def accuracy_curves(rows: Sequence[Row], task: Task) -> str:
    """Draw accuracy, or agreement if accuracies compare nothing, against FLOPs: an SVG with a line for each method."""
    figure, axes = canvas(10.5, 5.2)
    dense = next(row for row in rows if row.method == DENSE)
    value = _height(dense, task)[0]
    axes.axhline(value, color="#000", linewidth=1, linestyle=":", label=f"dense {value:.1f}")
    names = _names(rows)
    for number, name in enumerate(names):
        points = sorted((100 * row.flops_reduction, *_height(row, task)) for row in rows if row.method == name)
        ours = name == "fitprune"
        aside = 0.25 * (number - len(names) / 2)  # so that intervals at one budget do not cover each other
        axes.errorbar(
            [x + aside for x, _, _ in points],
            [y for _, y, _ in points],
            yerr=[[s[0] for *_, s in points], [s[1] for *_, s in points]],
            **_look(name, names),
            marker="o",
            markersize=4 if ours else 3,
            capsize=2,
            elinewidth=0.6,
            label=name.replace("$", r"\$"),
        )
    share = f"{task.figure}, % of {task.maximum:g}" if task.benchmark and task.maximum != 100 else f"{task.figure}, %"
    what = share if task.comparable else "agreement with dense, %"
    axes.set(xlabel="visual-token FLOPs removed, %", ylabel=what)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg_text(figure)


def _names(rows: Sequence[Row]) -> list[str]:
    """List the methods, in the order of the results."""
    return list(dict.fromkeys(row.method for row in rows if row.method != DENSE))


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Choose how a method's line looks, the same in every picture of the page."""
    if name == "fitprune":
        return {"color": "#000", "linestyle": "-", "linewidth": 2.4, "zorder": 3}
    turn, number = divmod([other for other in names if other != "fitprune"].index(name), len(_COLOURS))
    return {"color": _COLOURS[number], "linestyle": ("-", "--", ":")[turn % 3], "linewidth": 1.2, "zorder": 2}


def _height(row: Row, task: Task) -> tuple[float, tuple[float, float]]:
    """Compute the point of a row, in percent, and how far its interval reaches down and up."""
    if row.accuracy is None or row.accuracy_interval is None or not task.comparable:
        return 100 * row.agreement, (0.0, 0.0)
    low, high = row.accuracy_interval
    return 100 * row.accuracy, (max(0.0, 100 * (row.accuracy - low)), max(0.0, 100 * (high - row.accuracy)))


def keep_curves(rows: Sequence[Row], recipes: Mapping[str, Any]) -> str:
    """Draw the share of visual tokens that enters each layer: an SVG with a picture for each of up to three budgets.

    Args:
        rows: the rows of all tasks.
        recipes: label -> the recipe's JSON data.
    """
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    drawn: list[float | None] = [budget for budget in budgets if budget in (0.4, 0.6, 0.8)]
    drawn = drawn or [*budgets[:3]] or [None]
    columns = len(drawn)
    figure, axes = canvas(3.6 * columns + 1.4, 3.4, 1, columns)
    grid = list(axes) if columns > 1 else [axes]
    names = _names(rows)
    for axes, budget in zip(grid, drawn, strict=True):
        for name in names:
            recipe = recipes.get(label(name, budget))
            if recipe is None:
                continue
            entering = recipe.get("enter") or [1.0, *recipe["keep"][:-1]]
            axes.step(
                range(len(entering)),
                [100 * share for share in entering],
                where="mid",
                **_look(name, names),
                label=name.replace("$", r"\$"),
            )
        axes.set(xlabel="decoder layer", ylim=(-3, 103), title=f"{100 * budget:g}% cut" if budget is not None else "")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("visual tokens that enter, %")
    grid[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg_text(figure)
