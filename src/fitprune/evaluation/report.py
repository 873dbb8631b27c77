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
from fitprune._support.plots import canvas, svg_text
from fitprune.evaluation.metrics import METRICS
from fitprune.evaluation.results import DENSE, Results, Row, Task, label, marked, percent, verdict

# Okabe and Ito's colours, told apart by colour-blind eyes too; a second round is dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")

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

    Raises:
        ValueError: the results are damaged.
        OSError: `path` cannot be written.
        ImportError: matplotlib is not installed.
    """
    try:
        page = "\n".join(_page(results))
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, RuntimeError) as error:
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
    for task in results.tasks:
        rows = [row for row in results.rows if row.task == task.name]
        yield f"<h2>{html.escape(task.heading)}</h2>"
        for warning in task.warnings():
            yield f"<p class=not>{html.escape(warning)}</p>"
        yield from _matrix(rows, task, marked(results, task))
        if max(Counter(row.method for row in rows).values()) > 1:  # one budget is no curve
            yield f"<figure>{_curves(rows, task)}</figure>"
        yield "<details><summary>Every figure</summary>" + _full(rows, results) + "</details>"
        if rows[0].accuracy_by_kind and task.comparable:
            yield "<details><summary>Accuracy on each kind of question</summary>" + _kinds(rows) + "</details>"
    if results.recipes.keys():
        yield "<h2>Visual tokens that enter each layer</h2>"
        yield f"<figure>{_keep_curves(results)}</figure>"
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


def _budgets(rows: Sequence[Row]) -> list[float]:
    return sorted({row.budget for row in rows if row.budget is not None})


def _matrix(rows: Sequence[Row], task: Task, best: Mapping[float, float]) -> Iterator[str]:
    """Accuracy, methods down and budgets across; the best of each budget marked."""
    budgets = _budgets(rows)
    dense = next(row for row in rows if row.method == DENSE)
    alone = [row for row in rows if row.budget is None and row.method != DENSE]
    lines = [] if dense.accuracy is None else [f"<p>Dense: {_accuracy(dense)}</p>"]
    lines += [
        f"<p>{html.escape(row.method)}: {_figure(row, task)} at -{percent(row.flops_reduction)}</p>" for row in alone
    ]
    if budgets:
        head = "".join(f"<th>{100 * budget:g}%</th>" for budget in budgets)
        lines.append(f"<div class=wide><table><thead><tr><th>FLOPs cut</th>{head}</tr></thead><tbody>")
        for name in dict.fromkeys(row.method for row in rows if row.budget is not None):
            cells = []
            for budget in budgets:
                row = next((r for r in rows if r.method == name and r.budget == budget), None)
                mark = " class=best" if row and row.accuracy == best.get(budget) is not None else ""
                cells.append(f"<td{mark}>{_figure(row, task) if row else '-'}</td>")
            ours = " class=ours" if name == "fitprune" else ""
            lines.append(f"<tr{ours}><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
        lines.append("</tbody></table></div>")
    yield from lines


def _figure(row: Row, task: Task) -> str:
    """Accuracy where it compares something, else agreement."""
    return _accuracy(row) if task.comparable else f"{percent(row.agreement)} <span class=low>agreement</span>"


def _accuracy(row: Row) -> str:
    if row.accuracy is None or row.accuracy_interval is None:
        return "-"
    low, high = row.accuracy_interval
    return f"{100 * row.accuracy:.1f} <span class=low>{100 * low:.1f}&ndash;{100 * high:.1f}</span>"


def _full(rows: Sequence[Row], results: Results) -> str:
    times = {(t["method"], t["budget"]): t for t in results.timings.get("rows", ())}
    head = (
        "method", "seeds", "FLOPs cut", "prefill FLOPs", "tokens/layer", "tokens left", "KV bytes", "accuracy",
        "of dense", "agreement", "KL", "prefill time", "decode time",
    )  # fmt: skip
    body = []
    for row in rows:
        timed = times.get((row.method, row.budget))
        span = row.relative_interval
        relative = percent(row.relative_accuracy) + (
            f" ({100 * span[0]:.1f}&ndash;{100 * span[1]:.1f})" if span else ""
        )
        body.append(
            (
                html.escape(row.label), str(row.seeds), percent(row.flops_reduction), f"{row.prefill_flops_ratio:.2f}x",
                f"{row.mean_visual_tokens:.1f}", f"{row.visual_tokens_left:.0f}", f"{row.kv_bytes:,.0f}",
                _accuracy(row), relative, percent(row.agreement), f"{row.divergence:.4f}",
                f"{timed['prefill_ratio']:.2f}x" if timed else "-", f"{timed['decode_ratio']:.2f}x" if timed else "-",
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


def _curves(rows: Sequence[Row], task: Task) -> str:
    """Accuracy (agreement, where that compares nothing) against FLOPs, a line with its interval for each method."""
    figure, axes = canvas(10.5, 5.2)
    dense = next(row for row in rows if row.method == DENSE)
    value = _height(dense, task)[0]
    axes.axhline(value, color="#000", linewidth=1, linestyle=":", label=f"dense {value:.1f}")
    names = _names(rows)
    for number, name in enumerate(names):
        points = sorted((100 * row.flops_reduction, *_height(row, task)) for row in rows if row.method == name)
        ours = name == "fitprune"
        aside = 0.25 * (number - len(names) / 2)  # so that intervals at one budget can be told apart
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
    what = "accuracy, %" if task.comparable else "agreement with dense, %"
    axes.set(xlabel="visual-token FLOPs removed, %", ylabel=what)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg_text(figure)


def _names(rows: Sequence[Row]) -> list[str]:
    """The methods, in the order of the results."""
    return list(dict.fromkeys(row.method for row in rows if row.method != DENSE))


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    """How a method's line looks, the same in every picture of the page."""
    if name == "fitprune":
        return {"color": "#000", "linestyle": "-", "linewidth": 2.4, "zorder": 3}
    turn, number = divmod([other for other in names if other != "fitprune"].index(name), len(_COLOURS))
    return {"color": _COLOURS[number], "linestyle": ("-", "--", ":")[turn % 3], "linewidth": 1.2, "zorder": 2}


def _height(row: Row, task: Task) -> tuple[float, tuple[float, float]]:
    """The point of a row, in percent, and how far its interval reaches down and up."""
    if row.accuracy is None or row.accuracy_interval is None or not task.comparable:
        return 100 * row.agreement, (0.0, 0.0)
    low, high = row.accuracy_interval
    return 100 * row.accuracy, (max(0.0, 100 * (row.accuracy - low)), max(0.0, 100 * (high - row.accuracy)))


def _entering(recipe: Mapping[str, Any]) -> list[float]:
    return recipe.get("enter") or [1.0, *recipe["keep"][:-1]]


def _keep_curves(results: Results) -> str:
    """For each budget, the share of visual tokens that enters each layer, by method."""
    budgets = _budgets(results.rows)
    shown: list[float | None] = [budget for budget in budgets if budget in (0.4, 0.6, 0.8)]
    shown = shown or [*budgets[:3]] or [None]
    columns = len(shown)
    figure, axes = canvas(3.6 * columns + 1.4, 3.4, 1, columns)
    grid = list(axes) if columns > 1 else [axes]
    names = _names(results.rows)
    for axes, budget in zip(grid, shown, strict=True):
        for name in names:
            recipe = results.recipes.get(label(name, budget))
            if recipe is None:
                continue
            entering = _entering(recipe)
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


def _example(example: Mapping[str, Any], results: Results) -> Iterator[str]:
    """One sample: the picture under each method at a few layers, then what was said."""
    task = next(task for task in results.tasks if task.name == example["task"])
    accepted = [f"{text} ({n})" if n > 1 else text for text, n in Counter(example["accepted"]).items() if text.strip()]
    facts = f"{example['task']}, {example['kind'] or 'question'}, accepted: {' / '.join(accepted) or '-'}"
    yield f"<h3>{html.escape(example['question'])} <span class=low>{html.escape(facts)}</span></h3>"
    picture = html.escape(example["picture"])
    yield "<div class=strip><div style='width:9em;text-align:left'><b>dense</b><br>"
    yield f"{_said(example, DENSE, task)}</div>"
    yield f"<div><div class=image><img alt='' src='{picture}'></div>"
    yield "all layers</div></div>"
    shown = _pictured(example)
    layers = len(next(iter(results.recipes.values()))["keep"]) if results.recipes else 0
    chosen = sorted({1, layers // 4, layers // 2, layers - 1} & set(range(1, max(layers, 1))))
    for name in shown:
        entered = example["layers_entered"][name]
        side = math.isqrt(len(entered))
        yield f"<div class=strip><div style='width:9em;text-align:left'><b>{html.escape(name)}</b><br>"
        yield f"{_said(example, name, task)}</div>"
        if side * side != len(entered):
            yield f"<div>{len(entered)} tokens form no square grid: not drawn</div></div>"
            continue
        for layer in chosen:
            kept = [count > layer for count in entered]
            yield f"<div><div class=image><img alt='' src='{picture}'>{_veil(kept, side)}</div>"
            yield f"layer {layer}: {sum(kept)}</div>"
        yield "</div>"
    rows = [(html.escape(name), _said(example, name, task)) for name in example["said"]]
    yield "<details><summary>All answers</summary>" + _table(("method", "answer"), rows) + "</details>"


def _said(example: Mapping[str, Any], name: str, task: Task) -> str:
    """An answer, coloured where accepted answers mean something, and marked where dense answers otherwise."""
    said, mark = example["said"][name], ""
    if task.metric and task.comparable and any(text.strip() for text in example["accepted"]):
        score = METRICS[task.metric](said, example["accepted"])
        mark = f" class={'right' if score > 0 else 'wrong'}"
        mark += f" title='{score:.2g} of 1'" if 0 < score < 1 else ""
    changed = "" if said == example["said"][DENSE] else " <span class=changed>&ne; dense</span>"
    return f"&ldquo;<span{mark}>{html.escape(said)}</span>&rdquo;{changed}"


def _pictured(example: Mapping[str, Any]) -> list[str]:
    """Labels worth a strip: FitPrune's at the middle budgets, or the first few there are."""
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
