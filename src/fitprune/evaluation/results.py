"""The results of an evaluation: printed as tables, saved as JSON, loaded again. Knows no model."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitprune._support import files
from fitprune._support.text_tables import aligned
from fitprune.evaluation import tables
from fitprune.evaluation.summary import Best, Row, Task, label

SCHEMA = 4


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` measured. The same run gives the same file on the same day, byte for byte.

    Attributes:
        rows: task by task: dense first, then each method at each budget.
        best: the best method for each task and budget at which FitPrune and another method were evaluated, if
            accuracies compare something.
        skipped: methods that could not meet a budget, each with its reason.
        recipes: label -> the recipe's JSON data.
        examples: some samples with what each method kept; see `fitprune.evaluation.evaluate`.
        provenance: model, data, versions, sizes and date.
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
        return "".join(tables.html_table(task, self.rows_on(task.name), self.times()) for task in self.tasks)

    def rows_on(self, task: str) -> list[Row]:
        """Select the rows of a task, by its name."""
        return [row for row in self.rows if row.task == task]

    def times(self) -> tables.Times:
        """Find the measured times of each method and budget."""
        return {(entry["method"], entry["budget"]): entry for entry in self.timings.get("rows", ())}

    def row(self, name: str, task: str | None = None) -> Row:
        """Find a row.

        Args:
            name: its label, such as "dense" or "fastv 60%".
            task: its task; the first by default.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.label == name and task in (None, row.task):
                return row
        raise KeyError(f"{name!r}: no such row; there are {sorted({row.label for row in self.rows})}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the results as JSON, and times, if there are any, beside them as `NAME.timings.json`.

        Args:
            path: file to write.

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

        Args:
            path: file to read.

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


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def table(results: Results) -> str:
    """Format the rows for people, task by task."""
    parts = []
    for task in results.tasks:
        notes = [textwrap.fill(note, 100, subsequent_indent="  ") for note in task.warnings()]
        notes += [tables.TIMES] if results.times() else []
        rows = results.rows_on(task.name)
        tables_of_task = [aligned(tables.lines(task, rows, results.times()))]
        if len(rows[0].figures) > 1:
            tables_of_task.append(aligned(tables.figure_lines(rows)))
        parts.append("\n".join([task.heading, *tables_of_task, *notes]))
    for task in results.tasks:
        rows = results.rows_on(task.name)
        if task.comparable and any(row.budget is not None for row in rows):
            parts.append(tables.matrix(task, rows, results.best))
    if every := tables.overview(results.tasks, results.rows):
        parts.append(f"{aligned(every)}\n{tables.MEAN}")
    notes = [tables.verdict(best) for best in results.best]
    notes += [f"{label(s['method'], s['budget'])}: left out, {s['reason']}" for s in results.skipped]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def kind_table(results: Results, task: str | None = None) -> str:
    """Format the accuracy on each kind of question, a line for each row of the task (by default the first)."""
    rows = results.rows_on(results.rows[0].task if task is None else task)
    kinds = list(rows[0].accuracy_by_kind)
    lines = [(row.label, *(tables.percent(row.accuracy_by_kind[kind]) for kind in kinds)) for row in rows]
    return aligned([("", *kinds), *lines])
