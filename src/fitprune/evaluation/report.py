"""One HTML page of an evaluation that needs nothing else: tables, curves, kept tokens on images, answers, provenance.

Knows results only: no model, no data. Needs matplotlib (extra `figures`).
"""

from __future__ import annotations

import html
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fitprune._support import files
from fitprune.evaluation.curves import accuracy_curves, keep_curves
from fitprune.evaluation.results import Results
from fitprune.evaluation.summary import DENSE, Row, Task, label
from fitprune.evaluation.tables import MEAN, figure_lines, highest, overview, percent, time_ratios, verdict

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1b1b1b;background:#fff}
h1{font-size:1.6em}h2{font-size:1.25em;margin-top:2em;border-bottom:1px solid #ccc}h3{font-size:1.05em}
table{border-collapse:collapse;font-size:13px;margin:.8em 0}
th,td{padding:3px 8px;text-align:right;border-bottom:1px solid #e3e3e3}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #888}
.best{font-weight:700;background:#e6f2e6}.ours td:first-child{font-weight:700}.low{color:#666;font-size:11px}
.wide{overflow-x:auto}.not{color:#a33}figure{margin:1em 0;overflow-x:auto}
svg{max-width:100%;height:auto}figure svg{min-width:560px}
.strip{display:flex;gap:10px;flex-wrap:wrap;margin:.4em 0}.strip div{font-size:12px;text-align:center}
.image{position:relative;width:144px;height:144px}.image img{width:100%;height:100%;image-rendering:pixelated}
.image svg{position:absolute;left:0;top:0;width:100%;height:100%}.wrong{color:#a33}.right{color:#275}
.changed{color:#666;font-size:11px}
pre{background:#f5f5f5;padding:.8em;overflow-x:auto;font-size:12px}
"""


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all.

    Args:
        results: what to report.
        path: HTML file to write.

    Raises:
        ValueError: the results are damaged.
        OSError: `path` cannot be written.
        ImportError: matplotlib is not installed.
    """
    try:
        page = "\n".join(_page(results))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RuntimeError) as error:
        raise ValueError(f"the results are damaged ({type(error).__name__}: {error}); evaluate again") from None
    files.write_text(path, page)


def _page(results: Results) -> Iterator[str]:
    yield "<!doctype html><html lang=en><head><meta charset=utf-8>"
    yield "<meta name=viewport content='width=device-width,initial-scale=1'>"
    model = html.escape(str(results.provenance.get("model", "model")))
    yield f"<title>{model}: fitprune evaluation</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{model}: visual-token pruning against the dense model</h1>"
    yield (
        "<p>Every method runs in one engine and is solved to the same budget: the fraction of the visual tokens' "
        "decoder FLOPs that it removes. Intervals are 95% bootstrap intervals over samples, and over seeds where a "
        "method draws at random. The best of many methods is lucky too: a lead's interval is that of one "
        "comparison.</p>"
    )
    yield from _verdicts(results)
    if every := overview(results.tasks, results.rows):
        yield f"<h2>All benchmarks</h2>{_as_table(every)}<p class=low>{html.escape(MEAN)}</p>"
    for task in results.tasks:
        rows = results.rows_on(task.name)
        yield f"<h2>{html.escape(task.heading)}</h2>"
        for warning in task.warnings():
            yield f"<p class=not>{html.escape(warning)}</p>"
        yield from _matrix(rows, task, highest(task, rows, results.best))
        if max(Counter(row.method for row in rows).values()) > 1:  # one budget is no curve
            yield f"<figure>{accuracy_curves(rows, task)}</figure>"
        yield "<details><summary>Every figure</summary>" + _full(rows, task, results) + "</details>"
        if len(rows[0].figures) > 1:
            yield (
                "<details open><summary>The benchmark's figures, as published</summary>"
                + _as_table(figure_lines(rows))
                + "</details>"
            )
        if rows[0].accuracy_by_kind and task.comparable:
            yield "<details><summary>Accuracy on each kind of question</summary>" + _kinds(rows) + "</details>"
    if results.recipes.keys():
        yield "<h2>Visual tokens that enter each layer</h2>"
        yield f"<figure>{keep_curves(results.rows, results.recipes)}</figure>"
    if results.examples:
        yield "<h2>Examples</h2>"
        yield (
            "<p>Bright: visual tokens that still enter the layer. Answers in green are accepted, in red are not; black "
            "says nothing. &ne; marks what the dense model does not say.</p>"
        )
        for example in results.examples:
            yield from _example(example, results)
    if results.skipped:
        yield "<h2>Left out</h2><ul>"
        for entry in results.skipped:
            yield f"<li>{html.escape(label(entry['method'], entry['budget']))}: {html.escape(entry['reason'])}</li>"
        yield "</ul>"
    yield "<h2>Provenance</h2>"
    timed = {name: value for name, value in results.timings.items() if name != "rows"}
    facts = {**results.provenance, **({"timings": timed} if timed else {})}
    yield f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre></body></html>"


def _verdicts(results: Results) -> Iterator[str]:
    if not results.best:
        return
    yield "<ul>"
    for best in results.best:
        mark = "" if best.lead == 0 or best.cannot_tell else " class=not"
        yield f"<li{mark}>{html.escape(verdict(best))}</li>"
    yield "</ul>"


def _matrix(rows: Sequence[Row], task: Task, most: Mapping[float, float]) -> Iterator[str]:
    """Write the accuracy, methods down and budgets across, with the best of each budget marked."""
    dense = next(row for row in rows if row.method == DENSE)
    if dense.accuracy is not None:
        yield f"<p>Dense: {_accuracy(dense, task)}</p>"
    for row in rows:
        if row.budget is None and row.method != DENSE:
            yield f"<p>{html.escape(row.method)}: {_figure(row, task)} at -{percent(row.flops_reduction)}</p>"
    cells = {(row.method, row.budget): row for row in reversed(rows) if row.budget is not None}
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    if not budgets:
        return
    head = "".join(f"<th>{100 * budget:g}%</th>" for budget in budgets)
    yield f"<div class=wide><table><thead><tr><th>FLOPs cut</th>{head}</tr></thead><tbody>"
    for name in dict.fromkeys(row.method for row in rows if row.budget is not None):
        line = "".join(_cell(cells.get((name, budget)), task, most.get(budget)) for budget in budgets)
        ours = " class=ours" if name == "fitprune" else ""
        yield f"<tr{ours}><td>{html.escape(name)}</td>{line}</tr>"
    yield "</tbody></table></div>"


def _cell(row: Row | None, task: Task, most: float | None) -> str:
    if row is None:
        return "<td>-</td>"
    return f"<td{' class=best' if row.accuracy == most is not None else ''}>{_figure(row, task)}</td>"


def _figure(row: Row, task: Task) -> str:
    """Write the accuracy, or the agreement if accuracies compare nothing."""
    return _accuracy(row, task) if task.comparable else f"{percent(row.agreement)} <span class=low>agreement</span>"


def _accuracy(row: Row, task: Task) -> str:
    if row.accuracy is None:
        return "-"
    spread = task.interval_text(row.accuracy_interval, "&ndash;")
    return f"{task.as_text(row.accuracy).removesuffix('%')} <span class=low>{spread}</span>"


def _as_table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return _table(tuple(map(html.escape, head)), [tuple(map(html.escape, line)) for line in body])


def _full(rows: Sequence[Row], task: Task, results: Results) -> str:
    times = results.times()
    head = (
        "method", "seeds", "FLOPs cut", "prefill FLOPs", "tokens/layer", "tokens left", "KV bytes",
        task.figure, "of dense", "agreement", "KL", "prefill time", "decode time",
    )  # fmt: skip
    body = []
    for row in rows:
        span = row.relative_interval
        relative = percent(row.relative_accuracy) + (
            f" ({100 * span[0]:.1f}&ndash;{100 * span[1]:.1f})" if span else ""
        )
        body.append(
            (
                html.escape(row.label), str(row.seeds), percent(row.flops_reduction), f"{row.prefill_flops_ratio:.2f}x",
                f"{row.mean_visual_tokens:.1f}", f"{row.visual_tokens_left:.0f}", f"{row.kv_bytes:,.0f}",
                _accuracy(row, task), relative, percent(row.agreement), f"{row.divergence:.4f}",
                *time_ratios(row, times),
            )
        )  # fmt: skip
    return _table(head, body)


def _kinds(rows: Sequence[Row]) -> str:
    kinds = list(rows[0].accuracy_by_kind)
    body = [(html.escape(r.label), *(f"{100 * r.accuracy_by_kind[k]:.1f}" for k in kinds)) for r in rows]
    return _table(("accuracy, %", *map(html.escape, kinds)), body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _example(example: Mapping[str, Any], results: Results) -> Iterator[str]:
    """Write one sample: the picture under each method at a few layers, then the answers."""
    task = next(task for task in results.tasks if task.name == example["task"])
    accepted = [f"{text} ({n})" if n > 1 else text for text, n in Counter(example["accepted"]).items() if text.strip()]
    facts = f"{example['task']}, {example['kind'] or 'question'}, accepted: {' / '.join(accepted) or '-'}"
    yield f"<h3>{html.escape(example['question'])} <span class=low>{html.escape(facts)}</span></h3>"
    picture = html.escape(example["picture"])
    yield "<div class=strip><div style='width:9em;text-align:left'><b>dense</b><br>"
    yield f"{_answer(example, DENSE, task)}</div>"
    yield f"<div><div class=image><img alt='' src='{picture}'></div>"
    yield "all layers</div></div>"
    layers = len(next(iter(results.recipes.values()))["keep"]) if results.recipes else 0
    chosen = sorted({1, layers // 4, layers // 2, layers - 1} & set(range(1, max(layers, 1))))
    for name in _pictured(example):
        entered = example["layers_entered"][name]
        side = math.isqrt(len(entered))
        yield f"<div class=strip><div style='width:9em;text-align:left'><b>{html.escape(name)}</b><br>"
        yield f"{_answer(example, name, task)}</div>"
        if side * side != len(entered):
            yield f"<div>{len(entered)} tokens form no square grid: not drawn</div></div>"
            continue
        for layer in chosen:
            kept = [count > layer for count in entered]
            yield f"<div><div class=image><img alt='' src='{picture}'>{_veil(kept, side)}</div>"
            yield f"layer {layer}: {sum(kept)}</div>"
        yield "</div>"
    lines = [(html.escape(name), _answer(example, name, task)) for name in example["said"]]
    yield "<details><summary>All answers</summary>" + _table(("method", "answer"), lines) + "</details>"


def _answer(example: Mapping[str, Any], name: str, task: Task) -> str:
    """Write an answer, coloured if accepted answers mean something, and marked if the dense model's differs."""
    answer, mark = example["said"][name], ""
    score = example["scores"].get(name)
    if score is not None and task.comparable:
        mark = f" class={'right' if score > 0 else 'wrong'}"
        mark += f" title='{score:.2g} of 1'" if 0 < score < 1 else ""
    changed = "" if answer == example["said"][DENSE] else " <span class=changed>&ne; dense</span>"
    return f"&ldquo;<span{mark}>{html.escape(answer)}</span>&rdquo;{changed}"


def _pictured(example: Mapping[str, Any]) -> list[str]:
    """Choose the labels that get a strip of pictures: FitPrune's at the middle budgets, or the first three."""
    names = list(example["layers_entered"])
    ours = [name for name in names if name.startswith("fitprune ")]
    middle = [name for name in ours if name.endswith((" 60%", " 80%", " 90%"))]
    return middle or ours[:3] or names[:3]


def _veil(kept: Sequence[bool], side: int) -> str:
    """Darken the tokens that have left, as SVG over the picture."""
    cells = "".join(
        f"<rect x={i % side} y={i // side} width=1.02 height=1.02 />" for i, stays in enumerate(kept) if not stays
    )
    return f"<svg viewBox='0 0 {side} {side}' fill='#222' fill-opacity='.82' shape-rendering='crispEdges'>{cells}</svg>"
