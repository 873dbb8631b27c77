"""What an evaluation found: figures for each task, method and budget, with bootstrap intervals. Knows no model."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fitprune._support import files
from fitprune._support.text_tables import aligned

SCHEMA = 3
DENSE = "dense"
UNNAMED = "questions"  # the task of samples that come without a name
RESAMPLES = 2000
LEVEL = 0.95
ALMOST_NOTHING = 0.05  # where dense is right in fewer questions, accuracy compares nothing
MANY_NEAR = 0.1  # of the questions in which dense is wrong by words around alone, so many are worth a warning
ROOM = 0.05  # where a method may be so much more accurate than FitPrune, the questions are too few
FEWEST_AHEAD = 6  # questions; a lead of five is luck in one case of 16, even where none is lost (sign test)

Interval = tuple[float, float]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


@dataclasses.dataclass(frozen=True)
class Task:
    """Some questions, and how their answers are judged.

    Attributes:
        name: the task's name.
        questions: how many.
        answerable: how many of them have accepted answers.
        metric: a name of `fitprune.evaluation.metrics.METRICS`; None where no question has accepted answers.
        guess: whether the metric was chosen by the data.
        dense: the dense model's accuracy.
        near: questions in which the dense answer is wrong, but holds an accepted one among other words or lies in one.
        mismatch: an accepted answer, and what the dense model said, where accuracy may be of the wording.
        always: what the dense model says to every question, where it says one thing and they do not all accept it.
    """

    name: str
    questions: int
    answerable: int
    metric: str | None
    guess: bool
    dense: float | None
    near: int = 0
    mismatch: tuple[str, str] | None = None
    always: str | None = None

    @property
    def comparable(self) -> bool:
        """Whether accuracies compare anything: there are accepted answers, and the dense model says some of them."""
        return self.dense is not None and self.dense >= ALMOST_NOTHING

    @property
    def heading(self) -> str:
        """Name, size and metric in one line."""
        why = f" (guessed{': ten answers a question' if self.metric == 'vqa' else ''})" if self.guess else ""
        size = f"{self.questions} question{'s' if self.questions != 1 else ''}"
        name = "" if self.name == UNNAMED else f"{self.name}, "
        return f"{name}{size}" + (f", metric {self.metric}{why}" if self.metric else "")

    def warnings(self) -> list[str]:
        """Say what the figures cannot mean, a line each."""
        found = []
        if self.always is not None:
            found.append(f"the dense model answers {_short(self.always)} to every question: check the prompt")
        if self.dense is None:
            return [*found, "no accepted answers: accuracy unknown, agreement with dense is shown"]
        if missing := self.questions - self.answerable:
            found.append(
                f"{missing} of {self.questions} questions have no accepted answer: accuracy is of the other "
                f"{self.answerable}"
            )
        if self.mismatch is not None:
            accepted, said = map(_short, self.mismatch)
            if self.comparable:
                found.append(
                    f"in {self.near} of {self.answerable} questions the dense model is wrong by words around alone: "
                    f"check the accepted answers: e.g. accepted {accepted}, answered {said}"
                )
            else:
                near = f"; {self.near} answers are wrong by words around alone" if self.near else ""
                found.append(
                    f"the dense model is right in {self.dense * self.answerable:.3g} of {self.answerable} questions: "
                    f"accuracy compares nothing; check --metric or the accepted answers: e.g. accepted {accepted}, "
                    f"answered {said}{near}"
                )
        return found


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one method at one budget on one task; over several seeds, their mean.

    Attributes:
        task: the task's name.
        method: the method's name; "dense" is the model without pruning.
        budget: the budget that was asked for; None for the dense model and for recipes given as such.
        seeds: how many seeds went in.
        samples: how many samples.
        accuracy: mean score of the task's metric over the samples with accepted answers; None where there are none.
        accuracy_interval: its 95% bootstrap interval, over samples, and over seeds where there are several.
        relative_accuracy: accuracy as a fraction of the dense model's; None where that is almost nothing.
        relative_interval: its interval, dense and pruned resampled together.
        agreement: fraction of all samples answered as the dense model answers.
        divergence: mean KL divergence, in nats, of the first answer token's distribution from the dense model's.
        accuracy_by_kind: accuracy for each kind of question.
        flops_reduction: fraction of visual-token FLOPs removed (the paper's accounting), mean over samples.
        prefill_flops_ratio: FLOPs of the real prefill against dense: text, scoring, tower and head included.
        mean_visual_tokens: visual tokens that enter a layer, mean over layers and samples.
        visual_tokens_left: visual tokens after the last layer, mean over samples.
        kv_bytes: bytes of a sample's KV cache after prefill, mean over samples.
    """

    task: str
    method: str
    budget: float | None
    seeds: int
    samples: int
    accuracy: float | None
    accuracy_interval: Interval | None
    relative_accuracy: float | None
    relative_interval: Interval | None
    agreement: float
    divergence: float
    accuracy_by_kind: dict[str, float]
    flops_reduction: float
    prefill_flops_ratio: float
    mean_visual_tokens: float
    visual_tokens_left: float
    kv_bytes: float

    @property
    def label(self) -> str:
        """Name and budget in one."""
        return label(self.method, self.budget)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best method at one budget on one task, beside FitPrune.

    Attributes:
        task: the task's name.
        budget: the budget.
        method: the most accurate method.
        lead: by how much its accuracy is above FitPrune's; 0 if it is FitPrune.
        interval: 95% bootstrap interval of that difference; it holds 0 where the two cannot be told apart.
        questions: how many the figures are of.
        equals: other methods that are as accurate as the best.
        unsure: methods that so few questions leave more than `ROOM` to be ahead of FitPrune, and not surely so.
    """

    task: str
    budget: float
    method: str
    lead: float
    interval: Interval
    questions: int
    equals: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    @property
    def sure(self) -> bool:
        """Whether the method is more accurate than FitPrune, beyond the luck of the draw."""
        return is_sure(self.lead, self.interval, self.questions)

    @property
    def cannot_tell(self) -> bool:
        """Whether the questions are too few to say which method is best."""
        return bool(self.unsure) and not self.sure


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` found. The same run gives the same file, byte for byte.

    Attributes:
        rows: task by task: dense first, then each method at each budget.
        best: for each task and budget, the best method beside FitPrune; where FitPrune and another were evaluated, and
            accuracies compare something.
        skipped: methods that could not meet a budget, each with its reason.
        recipes: label -> the recipe's JSON data.
        examples: some samples with what each method kept; see `fitprune.evaluation.evaluate`.
        provenance: model, data, versions and sizes.
        answers: for each sample, its id, question, accepted answers, and the answer under each label. Not saved here:
            the journal beside the results holds them.
        timings: measured times, if any; saved in a file of their own, since they differ from run to run.
        tasks: the questions of each task, and how answers are judged.
    """

    rows: tuple[Row, ...]
    best: tuple[Best, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    recipes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    examples: tuple[dict[str, Any], ...] = ()
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    answers: tuple[dict[str, Any], ...] = ()
    timings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: tuple[Task, ...] = ()

    def __repr__(self) -> str:
        sizes = [f"{task.name}: {task.questions} questions" for task in self.tasks]
        labels = ", ".join(dict.fromkeys(row.label for row in self.rows))
        return f"Results({'; '.join([*sizes, *([textwrap.shorten(labels, 100)] if labels else [])])})"

    def __str__(self) -> str:
        return table(self)

    def _repr_html_(self) -> str:
        return "".join(_html_of(self, task) for task in self.tasks)

    def row(self, name: str, task: str | None = None) -> Row:
        """Find the row of a label such as "dense" or "fastv 60%", on the first task or the one named.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.label == name and task in (None, row.task):
                return row
        raise KeyError(f"{name!r}: no such row; there are {sorted({row.label for row in self.rows})}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the results as JSON, and times, if there are any, beside them as `NAME.timings.json`.

        Raises:
            OSError: `path` cannot be written.
        """
        data = {"schema": SCHEMA, **{name: getattr(self, name) for name in _SAVED}}
        for name in _RECORDS:
            data[name] = [dataclasses.asdict(entry) for entry in getattr(self, name)]
        files.write_json(path, data)
        if self.timings:
            files.write_json(beside(path, "timings.json"), {"results": _digest(path), **self.timings})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `save` wrote, and the times beside it if they are there and were saved with it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no results file of this version, or something else, such as a recipe.
        """
        files.require_path(path)
        if not Path(path).exists():
            raise files.missing(path, files.RESULTS)
        try:
            data = _read(path)
            if not isinstance(data, dict) or data.get("schema") != SCHEMA:
                raise ValueError(f"this version reads results of schema {SCHEMA}; evaluate again")
            rest = {name: data[name] for name in _SAVED}
            for name, kind in _RECORDS.items():
                rest[name] = tuple(kind(**{k: _tupled(v) for k, v in entry.items()}) for entry in data[name])
            rest |= {name: tuple(rest[name]) for name in ("skipped", "examples")}
            timed = beside(path, "timings.json")
            timings = _read(timed) if timed.exists() else {}
            if timings.pop("results", None) != _digest(path):
                timings = {}  # of an older run
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).removesuffix("; evaluate again")
            why = ValueError(f"not readable as results ({reason}); evaluate again")
            raise ValueError(files.explained(path, files.RESULTS, why)) from None
        return cls(timings=timings, **rest)


_SAVED = ("provenance", "tasks", "rows", "best", "skipped", "recipes", "examples")
_RECORDS: dict[str, Any] = {"tasks": Task, "rows": Row, "best": Best}


def beside(path: str | os.PathLike[str], ending: str) -> Path:
    """Name a file beside results: "results.json" and "timings.json" give "results.timings.json"."""
    return Path(path).with_name(f"{Path(path).name.removesuffix('.json')}.{ending}")


def _read(path: str | os.PathLike[str]) -> Any:
    """Read JSON whose numbers can be computed with."""
    number = files.bounded_number
    text = files.read_text(path, files.MOST_RESULT_BYTES)
    return files.parse_json(text, parse_int=number, parse_float=number, parse_constant=number)


def _digest(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def label(method: str, budget: float | None) -> str:
    """Name a method at a budget: "fastv 60%"."""
    return method if budget is None else f"{method} {100 * budget:g}%"


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Bootstrap:
    """Draws of samples, the same for every figure of a task, so that differences are paired.

    Args:
        samples: how many there are.
        seed: of the draws.
    """

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.draws = self.rng.integers(0, samples, (RESAMPLES, samples), dtype=np.int32)

    def means(self, hits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Mean of each draw: hits [seeds, samples] -> [RESAMPLES]; seeds are drawn too if there are several."""
        seeds = len(hits)
        if seeds == 1:
            return np.asarray(hits[0][self.draws].mean(1))
        # The seeds' draws have a generator of their own: the samples' stay paired with every other figure's.
        drawn = np.random.default_rng(1).integers(0, seeds, (RESAMPLES, seeds))
        each = np.stack([row[self.draws].mean(1) for row in hits], 1)  # [RESAMPLES, seeds]
        return np.asarray(np.take_along_axis(each, drawn, 1).mean(1))


def interval(draws: np.ndarray[Any, Any]) -> Interval:
    """The 95% percentile interval."""
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return round(float(low), 6), round(float(high), 6)


def is_sure(lead: float, spread: Interval, questions: int) -> bool:
    """Whether a difference of accuracies is one: its interval is above 0, and it is of questions enough.

    Args:
        lead: the difference, above 0 or not.
        spread: its paired bootstrap interval, which is too narrow where the questions that differ are few.
        questions: how many there are.
    """
    return spread[0] > 0 and round(lead * questions, 2) >= FEWEST_AHEAD


def table(results: Results) -> str:
    """Format the rows for people, task by task; fractions become percent here and only here."""
    parts = []
    for task in results.tasks:
        notes = [textwrap.fill(note, 100, subsequent_indent="  ") for note in task.warnings()]
        parts.append("\n".join([task.heading, aligned(_lines(results, task.name)), *notes]))
    parts += [matrix(results, task.name) for task in results.tasks if task.comparable and _solved(results, task.name)]
    notes = [verdict(best) for best in results.best]
    notes += [f"{label(s['method'], s['budget'])}: left out, {s['reason']}" for s in results.skipped]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _solved(results: Results, task: str) -> bool:
    return any(row.budget is not None for row in results.rows if row.task == task)


def _lines(results: Results, task: str) -> list[tuple[str, ...]]:
    """The table of one task, its head first."""
    times = {(t["method"], t["budget"]): t for t in results.timings.get("rows", ())}
    head = ("", "FLOPs cut", "tokens/layer", "tokens left", "KV bytes", "accuracy", "95% interval", "of dense")
    lines = [(*head, "agreement", "KL", *(("prefill", "decode") if times else ()))]
    for row in (row for row in results.rows if row.task == task):
        counts = (f"{row.mean_visual_tokens:.1f}", f"{row.visual_tokens_left:.0f}", f"{row.kv_bytes:,.0f}")
        spread = row.accuracy_interval
        shown = "-" if spread is None else f"{100 * spread[0]:.1f}..{100 * spread[1]:.1f}"
        cells = (percent(row.accuracy), shown, percent(row.relative_accuracy), percent(row.agreement))
        timed = times.get((row.method, row.budget))
        ratios = (f"{timed['prefill_ratio']:.2f}x", f"{timed['decode_ratio']:.2f}x") if timed else ("-", "-")
        cut = percent(row.flops_reduction)
        lines.append((row.label, cut, *counts, *cells, f"{row.divergence:.3f}", *(ratios if times else ())))
    return lines


def _html_of(results: Results, task: Task) -> str:
    """The table of one task for a notebook."""
    head, *body = [[html.escape(cell) for cell in line] for line in _lines(results, task.name)]
    rows = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in body)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in task.warnings())
    top = f"<thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead>"
    return f"<p>{html.escape(task.heading)}</p><table>{top}<tbody>{rows}</tbody></table>{notes}"


def marked(results: Results, task: Task) -> dict[float, float]:
    """For each budget, the accuracy that is marked as the best; none where nothing can be told."""
    if not task.comparable:
        return {}
    unclear = {best.budget for best in results.best if best.task == task.name and best.cannot_tell}
    most: dict[float, float] = {}
    for row in results.rows:
        if row.task == task.name and row.budget is not None and row.budget not in unclear:
            most[row.budget] = max(most.get(row.budget, 0.0), row.accuracy or 0.0)
    return most


def matrix(results: Results, task: str) -> str:
    """Format accuracy in percent on one task, methods down and budgets across, `*` at the best of each budget.

    After each figure stands half the width of its 95% interval.
    """
    rows = {(row.method, row.budget): row for row in results.rows if row.task == task}
    budgets = sorted({budget for _, budget in rows if budget is not None})
    best = marked(results, next(t for t in results.tasks if t.name == task))

    def cell(row: Row | None, most: float | None) -> str:
        if row is None or row.accuracy is None or row.accuracy_interval is None:
            return "-  "
        half = 50 * (row.accuracy_interval[1] - row.accuracy_interval[0])
        return f"{100 * row.accuracy:.1f} \u00b1{half:.1f}{'*' if row.accuracy == most else ' '}"

    lines = [(f"{task}, dense {cell(rows[DENSE, None], None)}", *(f"-{100 * budget:g}% FLOPs" for budget in budgets))]
    for method in dict.fromkeys(method for method, budget in rows if budget is not None):
        lines.append((method, *(cell(rows.get((method, budget)), best.get(budget)) for budget in budgets)))
    return aligned(lines)


def verdict(best: Best) -> str:
    """Say plainly which method is best at a budget, and whether FitPrune is; or that the questions are too few.

    The best of many methods is lucky too: the interval is that of one comparison, not of the best of all.
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
    sure = "more accurate" if best.sure else "not told apart from fitprune by these samples"
    return f"{where}: fitprune is NOT the best: {ahead}, {sure}"


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def kind_table(results: Results, task: str | None = None) -> str:
    """Format the accuracy on each kind of question, a line for each row of the task (by default the first)."""
    task = results.rows[0].task if task is None else task
    rows = [row for row in results.rows if row.task == task]
    kinds = list(rows[0].accuracy_by_kind)
    return aligned([("", *kinds), *((row.label, *(percent(row.accuracy_by_kind[k]) for k in kinds)) for row in rows)])


def percent(value: float | None) -> str:
    """Format a fraction as percent."""
    return "-" if value is None else f"{100 * value:.1f}%"
