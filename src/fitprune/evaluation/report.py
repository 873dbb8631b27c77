"""One HTML page of an evaluation that needs nothing else: findings, tables, curves, answers, examples, provenance.

Knows results only: no model, no data. Readable without script; with it, tables sort and answers are filtered.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fitprune._support import files
from fitprune._support.page import Html, escape, facts, page, table
from fitprune._support.text_tables import plural
from fitprune.evaluation import report_answers
from fitprune.evaluation.curves import OURS, accuracy_curves, keep_curves, line_of
from fitprune.evaluation.records import journal_of
from fitprune.evaluation.results import Results, beside
from fitprune.evaluation.summary import DENSE, Row, Task, label
from fitprune.evaluation.tables import MEAN, TIMES, figure_lines, highest, overview, percent, time_ratios, verdict

_HOW = (
    "Intervals are 95% bootstrap intervals over samples, and over seeds where a method draws at random. FLOPs are "
    "those that the decoder spends on visual tokens."
)
_BUDGETS = (
    " Every method runs in one engine and is solved to the same budget of them. The best of many methods is lucky too: "
    "a lead's interval is that of one comparison."
)


def write_report(
    results: Results, path: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None
) -> None:
    """Write the page, whole or not at all.

    Args:
        results: what to report.
        path: HTML file to write.
        source: file that the results were read from: the answers that changed are listed from the journal beside it.
            Without it, from the results themselves.

    Raises:
        ValueError: the results are damaged.
        OSError: `path` cannot be written.
    """
    try:
        model = Path(str(results.provenance.get("model", "model"))).name
        body = "\n".join(_body(results, source))
        text = page(
            f"{model}: visual-token pruning against the dense model",
            body,
            style=report_answers.STYLE,
            script=report_answers.SCRIPT,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RuntimeError) as error:
        raise ValueError(f"the results are damaged ({type(error).__name__}: {error}); evaluate again") from None
    files.write_text(path, text)


def _body(results: Results, source: str | os.PathLike[str] | None) -> Iterator[str]:
    yield facts(_facts(results, source))
    yield from _findings(results)
    if every := overview(results.tasks, results.rows):
        yield f"<h2>All benchmarks</h2>{_as_table(every, 'all benchmarks')}<p class=small>{escape(MEAN)}</p>"
    for task in results.tasks:
        yield from _task(task, results)
    if results.recipes.keys():
        yield f"<h2>Visual tokens that enter each layer</h2>{keep_curves(results.rows, results.recipes)}"
    records = results.answers or list(journal_of(results, source) if source is not None else ())
    journal = None if source is None else beside(source, "samples.jsonl").name
    yield from report_answers.examples(results)
    yield from report_answers.changes(results, records, journal)
    if results.skipped:
        lines = [f"<li>{escape(label(s['method'], s['budget']))}: {escape(s['reason'])}</li>" for s in results.skipped]
        yield f"<h2>Left out</h2><ul>{''.join(lines)}</ul>"
    timed = {name: value for name, value in results.timings.items() if name != "rows"}
    every_fact = json.dumps({**results.provenance, **({"timings": timed} if timed else {})}, indent=1)
    summary = "<summary>All that the answers depend on</summary>"
    yield f"<h2>Provenance</h2><details>{summary}<pre>{escape(every_fact)}</pre></details>"


def _facts(results: Results, source: str | os.PathLike[str] | None) -> Iterator[tuple[str, object]]:
    """Say what was evaluated: model, date, precision, questions, methods, and samples that recipes are fitted from."""
    known = results.provenance
    yield "model", known.get("model", "not recorded")
    if "date" in known:
        yield "date", known["date"]
    elif source is not None:  # of an older version
        written = datetime.datetime.fromtimestamp(os.stat(source).st_mtime, datetime.timezone.utc)
        yield "date", f"{written:%Y-%m-%d} ({Path(source).name} was last changed)"
    attention = f", {known['attention']} attention" if known.get("attention") else ""
    yield "precision", f"{known.get('dtype', 'not recorded')}{attention}"
    yield "questions", "; ".join(f"{task.questions:,} of {task.benchmark or task.name}" for task in results.tasks)
    budgets = sorted({row.budget for row in results.rows if row.budget is not None})
    methods = {row.method for row in results.rows if row.budget is not None}
    recipes = {row.method for row in results.rows if row.is_recipe}
    at = f" at {', '.join(f'{100 * budget:g}%' for budget in budgets)} of FLOPs removed"
    compared = [f"{plural(len(methods), 'method')}{at}"] if methods else []
    compared += [plural(len(recipes), "recipe")] if recipes else []
    yield "compared", " and ".join([DENSE, *compared])
    counts = [recipe.get("provenance", {}).get("samples") for recipe in results.recipes.values()]
    sizes = sorted({count for count in counts if isinstance(count, int)})
    yield "calibration", " or ".join(plural(size, "sample") for size in sizes) or "none, or not recorded"
    versions = [f"{name} {known[name]}" for name in ("fitprune", "transformers", "torch") if name in known]
    yield "software", ", ".join(versions) or "not recorded"


def _findings(results: Results) -> Iterator[str]:
    """List the best method of each budget; what is against FitPrune is marked."""
    lines = []
    for best in results.best:
        sign, mark = ("&asymp;", "") if best.cannot_tell else ("&check;", " class=good")
        if best.lead and not best.cannot_tell:
            sign, mark = "&cross;", " class=bad"
        lines.append(f"<li><span{mark} aria-hidden=true>{sign}</span> {escape(verdict(best))}</li>")
    if lines:
        yield f"<h2>Findings</h2><ul class=findings>{''.join(lines)}</ul>"
    at_budgets = any(row.budget is not None for row in results.rows)
    yield f"<p class=small>{escape(_HOW + (_BUDGETS if at_budgets else ''))}</p>"


def _task(task: Task, results: Results) -> Iterator[str]:
    """Write what is known of one task: warnings, the table of methods and budgets, the curves, and every figure."""
    rows = results.rows_on(task.name)
    yield f"<h2>{escape(task.heading)}</h2>"
    for warning in task.warnings():
        yield f"<p class=note>{escape(warning)}</p>"
    yield from _matrix(rows, task, highest(task, rows, results.best))
    if recipes := sorted((row for row in rows if row.is_recipe), key=lambda row: row.flops_reduction):
        head = ("recipe", "FLOPs cut", *((task.figure,) if task.comparable else ()), "agreement")
        body = [
            (row.label, percent(row.flops_reduction), *((_accuracy(row, task),) if task.comparable else ()),
             percent(row.agreement)) for row in recipes
        ]  # fmt: skip
        yield table(head, body, sortable=True, label=f"recipes, {task.name}")
    if max(Counter(map(line_of, rows)).values()) > 1:  # one budget is no curve
        yield accuracy_curves(rows, task)
    yield f"<details><summary>Every figure</summary>{_full(rows, task, results)}</details>"
    if len(rows[0].figures) > 1:
        yield (
            "<details open><summary>The benchmark's figures, as published</summary>"
            f"{_as_table(figure_lines(rows), f'figures, {task.name}')}</details>"
        )
    if rows[0].accuracy_by_kind and task.comparable:
        yield f"<details><summary>Accuracy on each kind of question</summary>{_kinds(rows, task)}</details>"


def _matrix(rows: Sequence[Row], task: Task, most: Mapping[float, float]) -> Iterator[str]:
    """Write the accuracy, methods down, the best of them first, and budgets across, with the best of each marked."""
    dense = next(row for row in rows if row.method == DENSE)
    if dense.accuracy is not None:
        yield f"<p>Dense: {_accuracy(dense, task)}</p>"
    cells = {(row.method, row.budget): row for row in reversed(rows) if row.budget is not None}
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    if not budgets:
        return

    def mean(method: str) -> float:
        own = [row for (name, _), row in cells.items() if name == method]
        return sum(_height(row, task) for row in own) / len(own)

    methods = dict.fromkeys(row.method for row in rows if row.budget is not None)
    body = [
        [name, *(_cell(cells.get((name, budget)), task, most.get(budget)) for budget in budgets)]
        for name in sorted(methods, key=mean, reverse=True)
    ]
    head = ["FLOPs cut", *(f"{100 * budget:g}%" for budget in budgets)]
    yield table(head, body, sortable=True, label=f"{task.figure} at each budget, {task.name}", ours=OURS)


def _height(row: Row, task: Task) -> float:
    return row.accuracy if row.accuracy is not None and task.comparable else row.agreement


def _cell(row: Row | None, task: Task, most: float | None) -> Html:
    if row is None:
        return Html("-")
    return Html(f"<td{' class=best' if row.accuracy == most is not None else ''}>{_figure(row, task)}</td>")


def _figure(row: Row, task: Task) -> Html:
    """Write the accuracy, or the agreement if accuracies compare nothing."""
    if task.comparable:
        return _accuracy(row, task)
    return Html(f"{percent(row.agreement)} <span class=small>agreement</span>")


def _accuracy(row: Row, task: Task) -> Html:
    if row.accuracy is None:
        return Html("-")
    spread = task.interval_text(row.accuracy_interval, "\u2013")
    return Html(f"{task.as_text(row.accuracy).removesuffix('%')} <span class='small interval'>{escape(spread)}</span>")


def _as_table(lines: Sequence[Sequence[str]], what: str) -> Html:
    head, *body = lines
    return table(head, body, sortable=True, label=what, ours=OURS)


def _full(rows: Sequence[Row], task: Task, results: Results) -> Html:
    times = results.times()
    head = (
        "method", "seeds", "FLOPs cut", "prefill FLOPs", "tokens/layer", "tokens left", "KV bytes",
        task.figure, "of dense", "agreement", "KL", "prefill time", "decode time",
    )  # fmt: skip
    body = []
    for row in rows:
        span = row.relative_interval
        relative = percent(row.relative_accuracy) + (f" ({100 * span[0]:.1f}\u2013{100 * span[1]:.1f})" if span else "")
        body.append(
            (
                row.label, row.seeds, percent(row.flops_reduction), f"{row.prefill_flops_ratio:.2f}x",
                f"{row.mean_visual_tokens:.1f}", f"{row.visual_tokens_left:.0f}", f"{row.kv_bytes:,.0f}",
                _accuracy(row, task), relative, percent(row.agreement), f"{row.divergence:.4f}",
                *time_ratios(row, times),
            )
        )  # fmt: skip
    written = table(head, body, sortable=True, label=f"every figure, {task.name}")
    return Html(f"{written}<p class=small>{escape(TIMES)}</p>" if times else written)


def _kinds(rows: Sequence[Row], task: Task) -> Html:
    kinds = list(rows[0].accuracy_by_kind)
    body = [(row.label, *(f"{100 * row.accuracy_by_kind[kind]:.1f}" for kind in kinds)) for row in rows]
    return table(("accuracy, %", *kinds), body, sortable=True, label=f"accuracy on each kind of question, {task.name}")
