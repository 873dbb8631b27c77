"""What an evaluation found: figures for each task, method and budget, with bootstrap intervals. Knows no model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fitprune import files
from fitprune.tables import aligned

SCHEMA = 2
DENSE = "dense"
RESAMPLES = 2000
LEVEL = 0.95

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one method at one budget on one task; over several seeds, their mean.

    Attributes:
        task: the task's name.
        method: the method's name; "dense" is the model without pruning.
        budget: the budget that was asked for; None for the dense model and for recipes given as such.
        seeds: how many seeds went in.
        samples: how many samples.
        accuracy: fraction of the samples with answers that are answered right; None where the data has no answers.
        accuracy_interval: its 95% bootstrap interval, over samples, and over seeds where there are several.
        relative_accuracy: accuracy as a fraction of the dense model's.
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
    """

    task: str
    budget: float
    method: str
    lead: float
    interval: Interval


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` found. The same run gives the same file, byte for byte.

    Attributes:
        rows: task by task: dense first, then each method at each budget.
        best: for each task and budget, the best method beside FitPrune; where FitPrune was evaluated.
        skipped: methods that could not meet a budget, each with its reason.
        recipes: label -> the recipe's JSON data.
        examples: some samples with what each method kept; see `fitprune.evaluation`.
        provenance: model, data, versions and sizes.
        answers: for each sample, its id, question, accepted answers, and the answer under each label. Not saved here:
            the journal beside the results holds them.
        timings: measured times, if any; saved in a file of their own, since they differ from run to run.
    """

    rows: tuple[Row, ...]
    best: tuple[Best, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    recipes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    examples: tuple[dict[str, Any], ...] = ()
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    answers: tuple[dict[str, Any], ...] = ()
    timings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        for name in ("rows", "best"):
            data[name] = [dataclasses.asdict(entry) for entry in getattr(self, name)]
        with files.replacing(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if self.timings:
            timed = {"results": _digest(path), **self.timings}
            with files.replacing(beside(path, "timings.json")) as temporary:
                temporary.write_text(json.dumps(timed, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `save` wrote, and the times beside it if they are there and were saved with it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no results file of this version, or something else, such as a recipe.
        """
        if not Path(path).exists():
            raise files.missing(path, files.RESULTS)
        try:
            data = _read(path)
            if not isinstance(data, dict) or data.get("schema") != SCHEMA:
                raise ValueError(f"this version reads results of schema {SCHEMA}; evaluate again")
            rows = tuple(Row(**{k: _tupled(v) for k, v in row.items()}) for row in data["rows"])
            best = tuple(Best(**{k: _tupled(v) for k, v in entry.items()}) for entry in data["best"])
            rest = {name: data[name] for name in _SAVED if name not in ("rows", "best")}
            rest |= {name: tuple(rest[name]) for name in ("skipped", "examples")}
            timed = beside(path, "timings.json")
            timings = _read(timed) if timed.exists() else {}
            if timings.pop("results", None) != _digest(path):
                timings = {}  # of an older run
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).removesuffix("; evaluate again")
            why = ValueError(f"not readable as results ({reason}); evaluate again")
            raise ValueError(files.explained(path, files.RESULTS, why)) from None
        return cls(rows=rows, best=best, timings=timings, **rest)


_SAVED = ("provenance", "rows", "best", "skipped", "recipes", "examples")


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


def table(results: Results) -> str:
    """Format the rows for people, task by task; fractions become percent here and only here."""
    parts = []
    times = {(t["method"], t["budget"]): t for t in results.timings.get("rows", ())}
    for task in dict.fromkeys(row.task for row in results.rows):
        head = ("", "FLOPs cut", "tokens/layer", "tokens left", "KV bytes", "accuracy", "95% interval", "of dense")
        lines = [(*head, "agreement", "KL", *(("prefill", "decode") if times else ()))]
        for row in (row for row in results.rows if row.task == task):
            counts = (f"{row.mean_visual_tokens:.1f}", f"{row.visual_tokens_left:.0f}", f"{row.kv_bytes:,.0f}")
            spread = row.accuracy_interval
            shown = "-" if spread is None else f"{100 * spread[0]:.1f}..{100 * spread[1]:.1f}"
            cells = (percent(row.accuracy), shown, percent(row.relative_accuracy), percent(row.agreement))
            timed = times.get((row.method, row.budget))
            ratios = (f"{timed['prefill_ratio']:.2f}x", f"{timed['decode_ratio']:.2f}x") if timed else ("-", "-")
            lines.append(
                (
                    row.label,
                    percent(row.flops_reduction),
                    *counts,
                    *cells,
                    f"{row.divergence:.3f}",
                    *(ratios if times else ()),
                )
            )
        parts.append(f"{task}, {next(r.samples for r in results.rows if r.task == task)} questions\n{aligned(lines)}")
    parts += [matrix(results, task) for task in dict.fromkeys(best.task for best in results.best)]
    notes = [verdict(best) for best in results.best]
    notes += [f"{label(s['method'], s['budget'])}: left out, {s['reason']}" for s in results.skipped]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def matrix(results: Results, task: str) -> str:
    """Format accuracy in percent on one task, methods down and budgets across, `*` at the best of each budget.

    Behind each figure stands half the width of its 95% interval.
    """
    rows = {(row.method, row.budget): row for row in results.rows if row.task == task}
    budgets = sorted({budget for _, budget in rows if budget is not None})
    best = {budget: max(row.accuracy or 0 for (_, at), row in rows.items() if at == budget) for budget in budgets}

    def cell(row: Row | None, most: float | None) -> str:
        if row is None or row.accuracy is None or row.accuracy_interval is None:
            return "-  "
        half = 50 * (row.accuracy_interval[1] - row.accuracy_interval[0])
        return f"{100 * row.accuracy:.1f} \u00b1{half:.1f}{'*' if row.accuracy == most else ' '}"

    lines = [(f"{task}, dense {cell(rows[DENSE, None], None)}", *(f"-{100 * budget:g}% FLOPs" for budget in budgets))]
    for method in dict.fromkeys(method for method, budget in rows if budget is not None):
        lines.append((method, *(cell(rows.get((method, budget)), best[budget]) for budget in budgets)))
    return aligned(lines)


def verdict(best: Best) -> str:
    """Say plainly which method is best at a budget, and whether FitPrune is.

    The best of many methods is lucky too: the interval is that of one comparison, not of the best of all.
    """
    where = f"{best.task} at {100 * best.budget:g}%"
    if best.method == "fitprune":
        return f"{where}: no method is more accurate than fitprune"
    points = f"{100 * best.lead:.1f} points ({100 * best.interval[0]:.1f}..{100 * best.interval[1]:.1f})"
    sure = "more accurate" if best.interval[0] > 0 else "not told apart from fitprune by these samples"
    return f"{where}: fitprune is NOT the best: {best.method} is ahead by {points}, {sure}"


def kind_table(results: Results, task: str | None = None) -> str:
    """Format the accuracy on each kind of question, a line for each row of the task (by default the first)."""
    task = results.rows[0].task if task is None else task
    rows = [row for row in results.rows if row.task == task]
    kinds = list(rows[0].accuracy_by_kind)
    return aligned([("", *kinds), *((row.label, *(percent(row.accuracy_by_kind[k]) for k in kinds)) for row in rows)])


def percent(value: float | None) -> str:
    """Format a fraction as percent."""
    return "-" if value is None else f"{100 * value:.1f}%"
