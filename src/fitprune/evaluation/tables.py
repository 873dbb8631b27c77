"""Tables of results for people, as text and HTML; fractions become percent here and only here."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fitprune._support.text_tables import aligned
from fitprune.evaluation.summary import DENSE, Best, Row, Task

MEAN = "of dense: the figure as a share of the dense model's, mean over the benchmarks where dense has one"
TIMES = "prefill and decode are times as ratios to dense in the same run: below 1.00x is faster"
MOST_COLUMNS = 6  # rows of results that are shown side by side
Times = Mapping[tuple[str, float | None], Mapping[str, Any]]  # (method, budget) -> its measured ratios to dense


def lines(task: Task, rows: Sequence[Row], times: Times) -> list[tuple[str, ...]]:
    """Write the table of one task, its head first."""
    head = ("", "FLOPs cut", "tokens/layer", "tokens left", "KV bytes", task.figure, "95% interval", "of dense")
    table = [(*head, "agreement", "KL", *(("prefill", "decode") if times else ()))]
    for row in rows:
        counts = (f"{row.mean_visual_tokens:.1f}", f"{row.visual_tokens_left:.0f}", f"{row.kv_bytes:,.0f}")
        figure = (task.as_text(row.accuracy), task.interval_text(row.accuracy_interval))
        cells = (*figure, percent(row.relative_accuracy), percent(row.agreement))
        ratios = time_ratios(row, times) if times else ()
        table.append((row.label, percent(row.flops_reduction), *counts, *cells, f"{row.divergence:.3f}", *ratios))
    return table


def time_ratios(row: Row, times: Times) -> tuple[str, str]:
    """Write a row's prefill and decoding times as ratios to dense."""
    timed = times.get((row.method, row.budget))
    return (f"{timed['prefill_ratio']:.2f}x", f"{timed['decode_ratio']:.2f}x") if timed else ("-", "-")


def html_table(task: Task, rows: Sequence[Row], times: Times) -> str:
    """Write the table of one task for a notebook."""
    head, *body = [[html.escape(cell) for cell in line] for line in lines(task, rows, times)]
    written = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in body)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in [*task.warnings(), *([TIMES] if times else [])])
    top = f"<thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead>"
    return f"<p>{html.escape(task.heading)}</p><table>{top}<tbody>{written}</tbody></table>{notes}"


def highest(task: Task, rows: Sequence[Row], best: Sequence[Best]) -> dict[float, float]:
    """Find the accuracy to mark as the best at each budget; there is none where the questions cannot tell."""
    if not task.comparable:
        return {}
    unclear = {entry.budget for entry in best if entry.task == task.name and entry.cannot_tell}
    most: dict[float, float] = {}
    for row in rows:
        if row.budget is not None and row.budget not in unclear:
            most[row.budget] = max(most.get(row.budget, 0.0), row.accuracy or 0.0)
    return most


def matrix(task: Task, rows: Sequence[Row], best: Sequence[Best]) -> str:
    """Format accuracy on one task, methods down and budgets across, `*` at the best of each budget.

    It is in percent, or a benchmark's figure.

    Each figure is followed by half the width of its 95% interval.

    Args:
        task: the task.
        rows: its rows.
        best: the best of each budget, of this task and others.
    """
    cells = {(row.method, row.budget): row for row in rows}
    budgets = sorted({budget for _, budget in cells if budget is not None})
    most = highest(task, rows, best)

    def cell(row: Row | None) -> str:
        if row is None or row.accuracy is None or row.accuracy_interval is None:
            return "-  "
        half = (row.accuracy_interval[1] - row.accuracy_interval[0]) / 2
        is_best = row.budget is not None and row.accuracy == most.get(row.budget)
        value, width = (task.as_text(part).removesuffix("%") for part in (row.accuracy, half))
        return f"{value} \u00b1{width}{'*' if is_best else ' '}"

    table = [(f"{task.name}, dense {cell(cells[DENSE, None])}", *(f"-{100 * budget:g}% FLOPs" for budget in budgets))]
    for method in dict.fromkeys(method for method, budget in cells if budget is not None):
        table.append((method, *(cell(cells.get((method, budget))) for budget in budgets)))
    return aligned(table)


def figure_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Write every figure of a benchmark as published: figures down and rows across, or turned if those are many."""
    down = [("", *rows[0].figures), *((row.label, *(f"{value:.2f}" for value in row.figures.values())) for row in rows)]
    return list(zip(*down, strict=True)) if len(rows) <= MOST_COLUMNS else down


def overview(tasks: Sequence[Task], rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Write the figure of each method on each benchmark, benchmarks across, and its mean as a share of dense.

    Args:
        tasks: all tasks; those that are no benchmarks, or have no figure, are left out.
        rows: the rows of all tasks.

    Returns:
        The lines, their head first; none for fewer than two benchmarks.
    """
    judged = [task for task in tasks if task.benchmark and task.metric]
    if len(judged) < 2:
        return []
    cells = {(row.label, row.task): row for row in rows}
    table = [("", "FLOPs cut", *(task.name for task in judged), "of dense")]
    for name in dict.fromkeys(row.label for row in rows):
        own = [cells[name, task.name] for task in judged]
        shares = [row.relative_accuracy for row in own if row.relative_accuracy is not None]
        mean = sum(shares) / len(shares) if shares else None
        cut = sum(row.flops_reduction for row in own) / len(own)
        figures = [task.as_text(row.accuracy) for task, row in zip(judged, own, strict=True)]
        table.append((name, percent(cut), *figures, percent(mean)))
    return table


def verdict(best: Best) -> str:
    """Say which method is best at a budget, and whether FitPrune is; or that the questions are too few.

    The interval is that of one comparison, and the best of many methods is in part lucky.
    """
    where = f"{best.task} at {100 * best.budget:g}%"
    ahead = (
        f"{_joined((best.method, *best.equals))} {'are' if best.equals else 'is'} ahead by {100 * best.lead:.1f} points"
    )
    ahead += f" ({100 * best.interval[0]:.1f}..{100 * best.interval[1]:.1f})"
    if best.cannot_tell:
        names = best.unsure if len(best.unsure) < 4 else (f"{len(best.unsure)} other methods",)
        more = f"; {ahead}" if best.lead > 0 else ""
        return f"{where}: {best.questions} questions cannot tell {_joined(('fitprune', *names))} apart{more}"
    if best.lead == 0:
        equals = f"; {_joined(best.equals)} as accurate" if best.equals else ""
        return f"{where}: no method is more accurate than fitprune{equals}"
    sure = "more accurate" if best.sure else "not confirmed by these samples"
    return f"{where}: fitprune is NOT the best: {ahead}, {sure}"


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def percent(value: float | None) -> str:
    """Format a fraction as percent."""
    return "-" if value is None else f"{100 * value:.1f}%"
