"""Compute the figures of an evaluation from the records of its answers. Runs no model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fitprune._support.journal import Record
from fitprune.calibration.samples import Sample
from fitprune.costs.cost import Cost
from fitprune.costs.sizes import ModelFingerprint
from fitprune.evaluation import metrics
from fitprune.evaluation.bootstrap import Bootstrap, Interval, interval, is_sure
from fitprune.evaluation.entries import Entry, grouped
from fitprune.evaluation.summary import ALMOST_NOTHING, DENSE, Best, Row, Task
from fitprune.recipes.recipe import PruningRecipe

SEVERAL = 6  # different questions; if they all get one answer, a warning says so
MANY_NEAR = 0.1  # share of the questions in which dense is wrong by words around alone that is worth a warning
ROOM = 0.05  # lead over FitPrune; if a method may have a larger one, the questions are too few


@dataclasses.dataclass(frozen=True)
class Judged:
    """One task's records, and the score of each answer.

    Attributes:
        task: the task.
        records: all its records.
        kinds: the kind of each question with accepted answers.
        scores: label -> [questions with accepted answers], from 0 to 1.
    """

    task: Task
    records: list[Record]
    kinds: list[str]
    scores: dict[str, np.ndarray[Any, Any]]


def chosen_metrics(tasks: Mapping[str, Sequence[Sample]], metric: str | None) -> dict[str, str]:
    """Name the metric of each task: the one that is passed, or the one that its data asks for.

    Args:
        tasks: task name -> questions.
        metric: a name of `fitprune.evaluation.metrics.METRICS`, or None.

    Raises:
        ValueError: there is no such metric, or it cannot be made of a task's answers.
    """
    return {
        task: metrics.choose(metric, [s.answers for s in samples if _has_answers(s.answers)])
        for task, samples in tasks.items()
    }


def _has_answers(accepted: Sequence[str]) -> bool:
    """Whether any accepted answer is not blank."""
    return any(text.strip() for text in accepted)


def judge(
    names: Mapping[str, str], guess: bool, entries: Sequence[Entry], records: Sequence[Record]
) -> Iterator[Judged]:
    """Score the answers of each task.

    Args:
        names: task -> metric.
        guess: whether the data chose the metrics.
        entries: the methods.
        records: the answers of all tasks.
    """
    for name, metric in names.items():
        own = [record for record in records if record["task"] == name]
        judged = [record for record in own if _has_answers(record["accepted"])]
        score = metrics.METRICS[metric]
        scores = {
            label: np.array([score(r["said"][label], r["accepted"]) for r in judged], dtype=np.float32)
            for label in [DENSE, *(entry.label for entry in entries)]
        }
        task = Task(name, len(own), 0, None, False, None, always=_one_answer(own))
        if judged:
            wording = _check_wording(judged, scores[DENSE])
            task = dataclasses.replace(task, answerable=len(judged), metric=metric, guess=guess, **wording)
        yield Judged(task, own, [record["kind"] for record in judged], scores)


def _check_wording(judged: Sequence[Record], dense: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Compute the dense model's accuracy, and whether it measures the wording: how often, and an example."""
    accuracy = _rounded(dense.mean())
    wrong = [record for record, score in zip(judged, dense, strict=True) if score == 0]
    near = [record for record in wrong if metrics.is_near(record["said"][DENSE], record["accepted"])]
    task = {"dense": accuracy, "near": len(near)}
    if accuracy >= ALMOST_NOTHING and len(near) <= MANY_NEAR * len(judged):
        return task
    example = [*near, *wrong][0]
    return {**task, "mismatch": (next(filter(str.strip, example["accepted"])), example["said"][DENSE])}


def _one_answer(records: Sequence[Record]) -> str | None:
    """Find the dense model's answer to all questions, if it has only one, they are several, and not all accept it."""
    answers = {record["said"][DENSE] for record in records}
    questions = {(record["question"], *record["accepted"]) for record in records}
    accepts = all(metrics.normalized(record["said"][DENSE], record["accepted"]) for record in records)
    return answers.pop() if len(answers) == 1 and len(questions) >= SEVERAL and not accepts else None


def rows_of(
    fingerprint: ModelFingerprint, parts: Sequence[Judged], entries: Sequence[Entry], value_bytes: int
) -> Iterator[Row]:
    """Compute the figures of each task: dense, then every method at every budget.

    Args:
        fingerprint: the model's.
        parts: the tasks with their scores.
        entries: the methods.
        value_bytes: bytes of a value of the KV cache.
    """
    for part in parts:
        boot = Bootstrap(part.task.answerable) if part.task.answerable else None
        groups: list[tuple[str, float | None, list[Entry]]] = [(DENSE, None, []), *grouped(entries)]
        for name, budget, group in groups:
            labels = [entry.label for entry in group] or [DENSE]
            visual = part.records[0]["sizes"][0]
            recipe = group[0].recipe if group else PruningRecipe.dense(fingerprint, visual or 1)
            yield Row(
                task=part.task.name,
                method=name,
                budget=budget,
                seeds=len(labels),
                samples=len(part.records),
                **_accuracy_of(part, labels, boot),
                **_agreement_of(part.records, labels),
                **_costs_of(recipe, part.records, value_bytes),
            )


def _accuracy_of(part: Judged, labels: Sequence[str], boot: Bootstrap | None) -> dict[str, Any]:
    """Compute accuracy, absolute and relative to dense, over seeds, with intervals; None without accepted answers."""
    scores = np.stack([part.scores[label] for label in labels])  # [seeds, questions]
    accuracy = spread = relative = relative_spread = None
    if boot is not None:
        draws = boot.means(scores)
        accuracy, spread = _rounded(scores.mean()), interval(draws)
        if part.task.comparable:
            dense = part.scores[DENSE]
            relative = _rounded(scores.mean() / dense.mean())
            relative_spread = interval(draws / np.maximum(boot.means(dense[None]), 1 / len(dense)))
    of_kind = {kind: np.array(part.kinds) == kind for kind in sorted({*part.kinds} - {""})}
    return {
        "accuracy": accuracy,
        "accuracy_interval": spread,
        "relative_accuracy": relative,
        "relative_interval": relative_spread,
        "accuracy_by_kind": {
            kind: _rounded(np.mean([row[where].mean() for row in scores])) for kind, where in of_kind.items()
        },
    }


def _agreement_of(records: Sequence[Record], labels: Sequence[str]) -> dict[str, Any]:
    """Average how often answers are the dense model's, and the divergence from it, over samples and seeds."""
    same = [record["said"][label] == record["said"][DENSE] for label in labels for record in records]
    divergence = [record["divergence"][label] for label in labels for record in records]
    return {"agreement": _rounded(np.mean(same)), "divergence": _rounded(np.mean(divergence))}


def _costs_of(recipe: PruningRecipe, records: Sequence[Record], value_bytes: int) -> dict[str, Any]:
    """Average the costs of a recipe over the samples that have an image."""

    @functools.cache
    def cost(visual: int, before: int, text: int, crops: int) -> Cost:
        return recipe.cost(
            visual_tokens=visual, text_before=before, text_tokens=text, crops=crops, value_bytes=value_bytes
        )

    costs = [cost(*record["sizes"]) for record in records if record["sizes"][0]]

    def mean(values: list[float]) -> float:
        return _rounded(np.mean(values)) if values else 0.0

    return {
        "flops_reduction": mean([c.flops_reduction for c in costs]),
        "prefill_flops_ratio": mean([c.prefill_flops / c.dense_prefill_flops for c in costs]),
        "mean_visual_tokens": mean([c.mean_visual_tokens for c in costs]),
        "visual_tokens_left": mean([c.kept[-1] for c in costs]),
        "kv_bytes": mean([c.kv_bytes for c in costs]),
    }


def best_of(parts: Sequence[Judged], entries: Sequence[Entry]) -> Iterator[Best]:
    """Find the most accurate method at each budget, and how sure its lead over FitPrune is.

    Args:
        parts: the tasks with their scores.
        entries: the methods.
    """
    groups = list(grouped(entries))
    for part in parts:
        if not part.task.comparable:
            continue
        for budget in dict.fromkeys(budget for _, budget, _ in groups if budget is not None):
            scores = {
                name: np.stack([part.scores[entry.label] for entry in group])
                for name, at, group in groups
                if at == budget
            }
            if "fitprune" in scores and len(scores) > 1:
                yield _best(part.task, budget, scores)


def _best(task: Task, budget: float, scores: Mapping[str, np.ndarray[Any, Any]]) -> Best:
    """Compare the methods at one budget by their scores [seeds, questions]."""
    boot = Bootstrap(task.answerable)
    ours = boot.means(scores["fitprune"])
    means = {name: _rounded(values.mean()) for name, values in scores.items()}
    leads = {name: _rounded(mean - means["fitprune"]) for name, mean in means.items()}
    spreads = {name: interval(boot.means(values) - ours) for name, values in scores.items()}
    # Among equals FitPrune comes first: a tie is no defeat.
    best = max(means, key=lambda name: (means[name], name == "fitprune"))
    return Best(
        task=task.name,
        budget=budget,
        method=best,
        lead=leads[best],
        interval=spreads[best],
        questions=task.answerable,
        equals=tuple(name for name, mean in means.items() if mean == means[best] and name != best),
        unsure=tuple(
            name for name in means if name != "fitprune" and _is_unsure(leads[name], spreads[name], task.answerable)
        ),
    )


def _is_unsure(lead: float, spread: Interval, count: int) -> bool:
    """Whether a method may be much more accurate than FitPrune, as far as these questions say."""
    low, high = spread
    # What happens in none of n questions may happen in 3 / n of them (rule of three).
    room = max(high, 3 / count)
    return room > ROOM and not is_sure(lead, spread, count) and not is_sure(-lead, (-high, -low), count)


def _rounded(value: Any) -> float:
    """Round to six digits: the others are rounding noise of sums."""
    return round(float(value), 6)
