"""Who answers what, for the report: the answers that changed, and some samples with what each method kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fitprune._support.journal import Record
from fitprune._support.page import Html, escape, table
from fitprune._support.text_tables import plural
from fitprune.evaluation.curves import OURS, spread
from fitprune.evaluation.records import Change, changed
from fitprune.evaluation.results import Results
from fitprune.evaluation.summary import DENSE, Task

MOST_LISTED = 500  # questions in the page
LONGEST = 400  # characters of an answer in the list
PICTURE = 288  # pixels of a side of a picture whose size is not recorded

STYLE = """
.findings{list-style:none;padding:0}.findings li{padding:.2em 0 .2em 1.6em;text-indent:-1.6em}
.findings span{display:inline-block;width:1.6em;text-indent:0;font-weight:700}
td .interval{display:block;white-space:nowrap;font-size:.75rem;font-weight:400}
.charts{gap:var(--gap) 1rem}.charts figure{margin:0}.charts .chart{flex:0 0 auto}
@media (max-width:799px){.charts{gap:var(--gap) 8px}}
.right{color:var(--good)}.right::before{content:"\\2713\\a0"}.wrong{color:var(--bad)}.wrong::before{content:"\\2717\\a0"}
.changed{color:var(--muted);font-size:var(--small)}
.changes{padding:0;list-style:none}.changes>li{border-bottom:1px solid var(--line);padding:.6em 0}
.changes ul{margin:.2em 0 0;padding-left:1.2em}.filter{margin:var(--gap) 0;gap:.6rem;align-items:end}
.filter[hidden]{display:none}.filter label{display:grid;flex:1 1 9rem;max-width:16rem}
.whole{width:min(100%,16rem)}
.strip{display:grid;grid-template-columns:repeat(4,minmax(0,11rem));gap:8px;margin:.4em 0 1em}
.strip div{font-size:var(--small)}.tile{width:100%;background:var(--panel)}
.tile .edge{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
@media (max-width:699px){.strip{grid-template-columns:repeat(2,minmax(0,1fr))}}
"""

SCRIPT = """
const filter = document.querySelector('.filter');
if (filter) {
  const [method, kind, text] = filter.elements, count = filter.querySelector('output');
  const questions = [...document.querySelectorAll('.changes>li')], more = document.createElement('button');
  let most = 50;
  const show = () => {
    let left = 0;
    for (const question of questions) {
      const visible = [...question.childNodes].filter(node => node.tagName !== 'UL').map(node => node.textContent);
      const before = visible.length;
      for (const answer of question.querySelectorAll('li')) {
        const fits = (!method.value || answer.dataset.by.split(' ').includes(method.value))
          && (!kind.value || answer.dataset.kind === kind.value);
        answer.hidden = !fits;
        if (fits) visible.push(answer.textContent);
      }
      const fits = visible.length > before && visible.join('').toLowerCase().includes(text.value.toLowerCase());
      left += fits;
      question.hidden = !fits || left > most;
    }
    count.textContent = left + ' of ' + questions.length;
    more.hidden = left <= most;
  };
  more.textContent = 'Show more';
  more.onclick = () => { most += 200; show(); };
  document.querySelector('.changes').after(more);
  filter.hidden = false;
  filter.oninput = show;
  filter.onsubmit = event => event.preventDefault();
  show();
}
"""


def changes(results: Results, records: Sequence[Record], journal: str | None) -> Iterator[str]:
    """List the questions that some method answers otherwise than the dense model.

    Args:
        results: of the evaluation.
        records: its answers, or none where they are not known.
        journal: name of the file that holds them, where there may be one.
    """
    yield "<h2>Answers that changed</h2>"
    if not records:
        where = f"Keep {journal} of this run beside the results" if journal else "Evaluate with a journal"
        yield f"<p class=note>{escape(where)}, and the answers that pruning changed are listed here.</p>"
        return
    questions = sum(task.questions for task in results.tasks)
    if len(records) < questions:
        yield f"<p class=note>The answers to {len(records):,} of {questions:,} questions could be read.</p>"
    every = list(changed(results, records))
    if not every:
        yield f"<p>None of {plural(len(records), 'question')} is answered otherwise than by the dense model.</p>"
        return
    labels = list(dict.fromkeys(label for record in records for label in record["said"] if label != DENSE))
    yield _counts(every, labels, len(records))
    # What FitPrune changed first, should there be too many to list.
    every.sort(key=lambda change: not any(by.startswith(f"{OURS} ") for who in change.answers.values() for by in who))
    listed = sorted(every[:MOST_LISTED], key=lambda change: change.record["place"])
    if len(listed) < len(every):
        more = f"; {journal} has all" if journal else ""
        yield f"<p class=small>{len(listed):,} of {len(every):,} questions are listed{escape(more)}.</p>"
    judged = any(change.scores for change in listed)
    yield _filter(labels, judged)
    yield "<ul class=changes>"
    numbers = {label: number for number, label in enumerate(labels)}
    for change in listed:
        yield _change(change, numbers)
    yield "</ul>"


def _counts(every: Sequence[Change], labels: Sequence[str], questions: int) -> Html:
    """Count what each method changed, most lost answers first."""
    counts = {label: Counter[str]() for label in labels}
    for change in every:
        for answer, who in change.answers.items():
            for label in who:
                counts[label][change.kind(answer)] += 1
    kinds = ("lost", "won", "other") if any(change.scores for change in every) else ("other",)
    order = sorted(labels, key=lambda label: [-counts[label][kind] for kind in kinds])
    body = [(label, sum(counts[label].values()), *(counts[label][kind] for kind in kinds[:-1])) for label in order]
    head = (f"of {plural(questions, 'question')}", "changed", *kinds[:-1])
    counted, mark = table(head, body, sortable=True, label="how many"), " open" if len(labels) <= 20 else ""
    return Html(f"<details{mark}><summary>How many</summary>{counted}</details>")


def _filter(labels: Sequence[str], judged: bool) -> str:
    """Write the form that filters the list; it is hidden where the browser runs no script."""
    methods = "".join(f"<option value={number}>{escape(label)}</option>" for number, label in enumerate(labels))
    kinds = "<option value=lost>right to wrong</option><option value=won>wrong to right</option>" if judged else ""
    return (
        "<form class='filter row' hidden><label>Method<select><option value=''>any</option>"
        f"{methods}</select></label><label>Change<select><option value=''>any</option>{kinds}</select></label>"
        "<label>Text<input type=search></label><output class=small></output></form>"
    )


def _change(change: Change, numbers: Mapping[str, int]) -> str:
    record = change.record
    dense = record["said"][DENSE]
    lines = "".join(
        f"<li data-by='{' '.join(str(numbers[label]) for label in who)}' data-kind={change.kind(answer)}>"
        f"{_quoted(answer, change.scores.get(answer))} <span class=small>{escape(', '.join(who))}</span></li>"
        for answer, who in change.answers.items()
    )
    facts = ", ".join(filter(None, (record["task"], record["kind"], str(record["id"]))))
    return (
        f"<li><b>{escape(_short(record['question']))}</b> <span class=small>{escape(facts)}</span><br>"
        f"dense: {_quoted(dense, change.scores.get(dense))}{_accepted(record)}<ul>{lines}</ul></li>"
    )


def _accepted(record: Mapping[str, Any]) -> str:
    """Write the accepted answers, the most frequent first."""
    texts = [
        f"{text} ({n})" if n > 1 else text for text, n in Counter(record["accepted"]).most_common() if text.strip()
    ]
    return f", accepted: {escape(_short(' / '.join(texts)))}" if texts else ""


def _quoted(answer: str, score: float | None) -> str:
    """Write an answer, marked as right or wrong if that is known."""
    mark = ""
    if score is not None:
        mark = f" class={'right' if score > 0 else 'wrong'}"
        mark += f" title='{score:.2g} of 1'" if 0 < score < 1 else ""
    return f"<span{mark}>&ldquo;{escape(_short(answer))}&rdquo;</span>"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def examples(results: Results) -> Iterator[str]:
    """Show some samples: the picture, what each method keeps of it at a few layers, and the answers."""
    if not results.examples:
        return
    yield (
        "<h2>Examples</h2><p>Bright, outlined: visual tokens that still enter the layer. &#10003; and &#10007;: "
        "accepted, or not. &ne; dense: not what the dense model says.</p>"
    )
    for number, example in enumerate(results.examples):
        yield from _example(example, results, f"picture{number}")


def _example(example: Mapping[str, Any], results: Results, name: str) -> Iterator[str]:
    """Write one sample; its picture stands in the page once, and each tile uses it."""
    task = next(task for task in results.tasks if task.name == example["task"])
    facts = f"{example['task']}, {example['kind'] or 'question'}"
    yield f"<section><h3>{escape(example['question'])}</h3>"
    yield f"<p class=small>{escape(facts)}{_accepted(example)}</p>"
    width, height = map(float, example.get("size", (PICTURE, PICTURE)))
    yield (
        f"<svg class=whole viewBox='0 0 {width:g} {height:g}' role=img><title>{escape(example['question'])}</title>"
        f"<image id={name} width={width:g} height={height:g} preserveAspectRatio=none "
        f"href='{escape(example['picture'])}'/></svg>"
    )
    tokens = len(next(iter(example["layers_entered"].values()), ()))
    yield f"<p><b>dense</b> {_answer(example, DENSE, task)}{f', {tokens} tokens in all layers' if tokens else ''}</p>"
    layers = len(next(iter(results.recipes.values()))["keep"]) if results.recipes else 0
    chosen = sorted({1, layers // 4, layers // 2, layers - 1} & set(range(1, max(layers, 1))))
    views = example.get("views", _square(tokens))
    for method in _pictured(example, results):
        entered = example["layers_entered"][method]
        yield f"<p><b>{escape(method)}</b> {_answer(example, method, task)}</p>"
        if not views:
            yield f"<p class=small>Where the {len(entered)} tokens lie in the picture is not known: not drawn.</p>"
            continue
        tiles = []
        for view in views:
            prefix = f"{view['name']}, " if len(views) > 1 else ""
            for layer in chosen:
                stays = [count > layer for count in entered]
                tiles.append(_tile(name, view, stays, (width, height), f"{prefix}layer {layer}"))
        yield f"<div class=strip>{''.join(tiles)}</div>"
    lines = [(method, Html(_answer(example, method, task))) for method in example["said"]]
    answers = table(("method", "answer"), lines, label=f"all answers, example {name}")
    yield f"<details><summary>All answers</summary>{answers}</details></section>"


def _square(tokens: int) -> list[dict[str, Any]]:
    """Lay tokens of which no place is recorded in a square over the whole picture, if they form one."""
    side = math.isqrt(tokens)
    if side * side != tokens or not tokens:
        return []
    rows = [list(range(start, start + side)) for start in range(0, tokens, side)]
    return [{"name": "whole picture", "extent": [0, 0, 1, 1], "grids": [{"box": [0, 0, 1, 1], "tokens": rows}]}]


def _tile(name: str, view: Mapping[str, Any], stays: Sequence[bool], size: tuple[float, float], text: str) -> str:
    """Draw a view of the picture with the tokens that have left in the dark."""
    import torch

    from fitprune.families.grids import Grid
    from fitprune.pictures.draw import OUTLINE
    from fitprune.pictures.player import veil
    from fitprune.pictures.views import View

    def scaled(box: Sequence[float]) -> Any:
        return tuple(part * side for part, side in zip(box, size * 2, strict=True))

    tokens = [torch.tensor(grid["tokens"]) for grid in view["grids"]]
    grids = [(Grid(own, None, text), scaled(grid["box"])) for own, grid in zip(tokens, view["grids"], strict=True)]
    left, top, right, bottom = extent = scaled(view["extent"])
    present = torch.tensor(stays)
    gone, edge = veil(View(tuple(grids), extent, text), present)
    text = f"{text}: {sum(int(present[own].sum()) for own in tokens)}"
    return (
        f"<div><svg class=tile viewBox='{left:.5g} {top:.5g} {right - left:.5g} {bottom - top:.5g}' role=img>"
        f"<title>{escape(text)} tokens</title><use href=#{name} /><path d='{gone}' fill='#000' fill-opacity=.8 "
        f"shape-rendering=crispEdges /><path class=edge d='{edge}' stroke='rgb{OUTLINE}' /></svg>{escape(text)}</div>"
    )


def _answer(example: Mapping[str, Any], name: str, task: Task) -> str:
    """Write an answer, marked as right or wrong if that is known, and if the dense model's differs."""
    answer = example["said"][name]
    changed_mark = "" if answer == example["said"][DENSE] else " <span class=changed>&ne; dense</span>"
    return _quoted(answer, example["scores"].get(name) if task.comparable else None) + changed_mark


def _pictured(example: Mapping[str, Any], results: Results) -> list[str]:
    """Choose the labels that get a strip of pictures: FitPrune's at the middle budgets, or some spread over FLOPs."""
    cuts = {row.label: row.flops_reduction for row in results.rows}
    names = {name: cuts.get(name, 0.0) for name in example["layers_entered"]}
    ours = {name: cut for name, cut in names.items() if name.startswith(f"{OURS} ")}
    middle = [name for name in ours if name.endswith((" 60%", " 80%", " 90%"))]
    return middle or spread(ours or names, 3)
