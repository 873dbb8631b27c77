"""Compute the figures of an evaluation from the records of its answers. Runs no model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fitprune._support.journal import Record
from fitprune.benchmarks.base import Benchmark
from fitprune.benchmarks.measure import Measure, mean_by_group
from fitprune.calibration.samples import Sample
from fitprune.costs.cost import Cost
from fitprune.costs.sizes import ModelFingerprint
from fitprune.evaluation import metrics
from fitprune.evaluation.bootstrap import Interval, interval, is_sure, over_seeds, sums
from fitprune.evaluation.entries import Entry, grouped
from fitprune.evaluation.summary import DENSE, Best, Row, Task
from fitprune.evaluation.wording import check_wording, one_answer
from fitprune.recipes.recipe import PruningRecipe

ROOM = 0.05  # lead over FitPrune; if a method may have a larger one, the questions are too few


@dataclasses.dataclass
class Judged:
    """One task's records, and the score of each answer.

    Attributes:
        task: the task.
        records: all its records.
        judged: those of questions with accepted answers.
        scores: label -> [judged], from 0 to 1.
        measure: from scores to figures; None where nothing is judged.
    """

    task: Task
    records: list[Record]
    judged: list[Record]
    scores: dict[str, np.ndarray[Any, Any]]
    measure: Measure | None

    @functools.cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """Each label's figures, the first the task's accuracy."""
        assert self.measure
        return {label: self.measure.of(scores) for label, scores in self.scores.items()}

    def accuracy(self, labels: Sequence[str]) -> float:
        """Average the accuracy over seeds, as a fraction of its maximum."""
        return float(np.mean([next(iter(self.figures[label].values())) for label in labels])) / self.task.maximum

    @functools.cached_property
    def _draws(self) -> dict[str, np.ndarray[Any, Any]]:
        assert self.measure
        counts = [self.measure.counts(scores) for scores in self.scores.values()]
        totals = np.split(sums(np.concatenate(counts, 1)), len(counts), 1)
        mains = [next(iter(self.measure.figures(each).values())) for each in totals]
        return dict(zip(self.scores, mains, strict=True))

    def draws(self, labels: Sequence[str]) -> np.ndarray[Any, Any]:
        """Bootstrap the accuracy over questions and seeds, [RESAMPLES], as a fraction of its maximum."""
        return over_seeds([self._draws[label] for label in labels]) / self.task.maximum


def chosen_metrics(tasks: Mapping[str, Sequence[Sample]], metric: str | None) -> dict[str, str]:
    """Name the metric of each task: the one that is passed, or the one that its data asks for.

    Args:
        tasks: task name -> questions; no benchmarks, which have their own.
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
    tasks: Mapping[str, Sequence[Sample]],
    metric_of: Mapping[str, Benchmark | str],
    guess: bool,
    labels: Sequence[str],
    records: Sequence[Record],
) -> Iterator[Judged]:
    """Score the answers of each task.

    Args:
        tasks: task name -> questions.
        metric_of: task name -> benchmark, or the name of a metric.
        guess: whether the data chose these names.
        labels: of the answers, dense first.
        records: the answers of all tasks, in order.
    """
    rest = iter(records)
    for name, samples in tasks.items():
        own = list(itertools.islice(rest, len(samples)))
        benchmark = metric_of[name]
        alone = sum(sample.image is None for sample in samples)
        task = Task(name, len(own), 0, None, False, None, always=one_answer(own), text_alone=alone)
        if isinstance(benchmark, str):
            yield _judge_data(task, samples, own, labels, benchmark, guess)
        elif (score := benchmark.score) is None:
            yield Judged(dataclasses.replace(task, benchmark=benchmark.title), own, [], {}, None)
        else:
            pairs = list(zip(samples, own, strict=True))
            scores = {label: np.array([score(r["said"][label], s) for s, r in pairs]) for label in labels}
            part = Judged(task, own, own, scores, benchmark.measure(samples))
            figure, value = next(iter(part.figures[DENSE].items()))
            task = dataclasses.replace(
                task,
                answerable=len(own),
                metric=benchmark.metric,
                benchmark=benchmark.title,
                figure=figure,
                maximum=benchmark.maximum,
                dense=_rounded(value / benchmark.maximum),
            )
            yield dataclasses.replace(part, task=task)


def _judge_data(
    task: Task, samples: Sequence[Sample], own: list[Record], labels: Sequence[str], metric: str, guess: bool
) -> Judged:
    """Score the answers of a task that is no benchmark."""
    pairs = [(s, r) for s, r in zip(samples, own, strict=True) if _has_answers(r["accepted"])]
    if not pairs:
        return Judged(task, own, [], {}, None)
    judged, score = [record for _, record in pairs], metrics.METRICS[metric]
    scores = {label: np.array([score(r["said"][label], r["accepted"]) for r in judged]) for label in labels}
    wording = check_wording(judged, scores[DENSE])
    task = dataclasses.replace(task, answerable=len(judged), metric=metric, guess=guess, **wording)
    return Judged(task, own, judged, scores, mean_by_group([sample for sample, _ in pairs], scale=1))


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
                **_accuracy_of(part, labels),
                **_agreement_of(part.records, labels),
                **_costs_of(recipe, part.records, value_bytes),
            )


def _accuracy_of(part: Judged, labels: Sequence[str]) -> dict[str, Any]:
    """Compute accuracy, absolute and relative to dense, over seeds, with intervals; None without accepted answers."""
    accuracy = spread = relative = relative_spread = None
    figures: dict[str, float] = {}
    if part.measure is not None:
        draws = part.draws(labels)
        accuracy, spread = _rounded(part.accuracy(labels)), interval(draws)
        if part.task.comparable:
            relative = _rounded(part.accuracy(labels) / part.accuracy([DENSE]))
            relative_spread = interval(draws / np.maximum(part.draws([DENSE]), 1 / len(part.judged)))
        names = part.figures[DENSE]
        figures = {name: _rounded(np.mean([part.figures[label][name] for label in labels])) for name in names}
    is_benchmark = part.task.benchmark is not None
    return {
        "accuracy": accuracy,
        "accuracy_interval": spread,
        "relative_accuracy": relative,
        "relative_interval": relative_spread,
        "accuracy_by_kind": {} if is_benchmark else dict(list(figures.items())[1:]),
        "figures": figures if is_benchmark else {},
    }


def _agreement_of(records: Sequence[Record], labels: Sequence[str]) -> dict[str, Any]:
    """Average how often answers are the dense model's, and the divergence from it, over images' samples and seeds."""
    records = [record for record in records if record["sizes"][0]] or records
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

    def mean(values: list[float], nothing: float = 0.0) -> float:
        return _rounded(np.mean(values)) if values else nothing

    return {
        "flops_reduction": mean([c.flops_reduction for c in costs]),
        "prefill_flops_ratio": mean([c.prefill_flops / c.dense_prefill_flops for c in costs], 1.0),
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
            labels = {name: [entry.label for entry in group] for name, at, group in groups if at == budget}
            if "fitprune" in labels and len(labels) > 1:
                yield _best(part, budget, labels)


def _best(part: Judged, budget: float, labels: Mapping[str, Sequence[str]]) -> Best:
    """Compare the methods at one budget, each with the labels of its seeds."""
    task, ours = part.task, part.draws(labels["fitprune"])
    means = {name: _rounded(part.accuracy(own)) for name, own in labels.items()}
    leads = {name: _rounded(mean - means["fitprune"]) for name, mean in means.items()}
    spreads = {name: interval(part.draws(own) - ours) for name, own in labels.items()}
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
