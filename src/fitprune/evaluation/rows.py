"""From the records of an evaluation to its figures: a row for each method and budget, and the best. Runs no model."""

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
from fitprune.evaluation import metrics, results
from fitprune.evaluation.results import DENSE, Best, Bootstrap, Row, Task, interval
from fitprune.recipes.recipe import PruningRecipe

SEVERAL = 6  # questions that differ and get one answer


@dataclasses.dataclass(frozen=True)
class Entry:
    """One column of an evaluation.

    Attributes:
        name: the method's name, the same for all its budgets and seeds.
        recipe: what the method is; it names its scorer.
        budget: what was asked for; None for a recipe given as such.
        seed: of a method that draws at random; None for others.

    Raises:
        ValueError: the recipe draws by another seed.
    """

    name: str
    recipe: PruningRecipe
    budget: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        drawn = self.recipe.scorer.get("parameters", {}).get("seed", self.seed)
        if self.seed is not None and drawn != self.seed:
            raise ValueError(
                f"seed={self.seed}: the recipe of {self.name!r} draws by seed {drawn}; state that, or None"
            )

    @property
    def label(self) -> str:
        """Name, budget and seed in one."""
        return results.label(self.name, self.budget) + ("" if self.seed is None else f" seed {self.seed}")


def entries_of(methods: Any) -> list[Entry]:
    """Make entries of a recipe, of several (named "recipe 1", ...), of name -> recipe; entries stay as they are.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    elif isinstance(methods, Sequence):
        pairs = [(f"recipe {number}", used) for number, used in enumerate(methods, 1)]
    else:
        pairs = [("recipe", methods)]
    entries = []
    for name, used in pairs:
        if not isinstance(used, (PruningRecipe, Entry)):
            raise ValueError(
                f"methods hold a {type(used).__name__}: must be a recipe, a list of them, name -> recipe, or what "
                "entries_for gives; PruningRecipe.named reads a file"
            )
        entries.append(used if isinstance(used, Entry) else Entry(name, used))
    return entries


def grouped(entries: Sequence[Entry]) -> Iterator[tuple[str, float | None, list[Entry]]]:
    """Gather the seeds of each method and budget."""
    groups: dict[tuple[str, float | None], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.name, entry.budget), []).append(entry)
    for (name, budget), group in groups.items():
        yield name, budget, group


def firsts(entries: Sequence[Entry]) -> list[Entry]:
    """Of each method and budget the first seed."""
    return [group[0] for _, _, group in grouped(entries)]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One task's records, and how right each answer is.

    Attributes:
        task: the task.
        records: all of them.
        kinds: the kind of each question with accepted answers.
        scores: label -> [questions with accepted answers], from 0 to 1.
    """

    task: Task
    records: list[Record]
    kinds: list[str]
    scores: dict[str, np.ndarray[Any, Any]]


def chosen_metrics(tasks: Mapping[str, Sequence[Sample]], metric: str | None) -> dict[str, str]:
    """Name the metric of each task: the one stated, or by its data.

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
        guess: whether the metrics were chosen by the data.
        entries: what answered, beside the dense model.
        records: the answers.
    """
    for name, metric in names.items():
        own = [record for record in records if record["task"] == name]
        judged = [record for record in own if _has_answers(record["accepted"])]
        score = metrics.METRICS[metric]
        scores = {
            label: np.array([score(r["said"][label], r["accepted"]) for r in judged], dtype=np.float32)
            for label in [DENSE, *(entry.label for entry in entries)]
        }
        task = Task(name, len(own), 0, None, False, None)
        if judged:
            task = Task(name, len(own), len(judged), metric, guess, *_checked(judged, scores[DENSE]))
        task = dataclasses.replace(task, always=_always(own))
        yield Judged(task, own, [record["kind"] for record in judged], scores)


def _checked(judged: Sequence[Record], dense: np.ndarray[Any, Any]) -> tuple[float, int, tuple[str, str] | None]:
    """The dense model's accuracy, and whether that is of wording: how often it is, and an example."""
    accuracy = _rounded(dense.mean())
    wrong = [record for record, score in zip(judged, dense, strict=True) if score == 0]
    near = [record for record in wrong if metrics.is_near(record["said"][DENSE], record["accepted"])]
    if accuracy >= results.ALMOST_NOTHING and len(near) <= results.MANY_NEAR * len(judged):
        return accuracy, len(near), None
    shown = [*near, *wrong][0]
    return accuracy, len(near), (next(filter(str.strip, shown["accepted"])), shown["said"][DENSE])


def _always(records: Sequence[Record]) -> str | None:
    """What the dense model answers to every question, where these are several and do not all accept it."""
    said = {record["said"][DENSE] for record in records}
    questions = {(record["question"], *record["accepted"]) for record in records}
    accepts = all(metrics.normalized(record["said"][DENSE], record["accepted"]) for record in records)
    return said.pop() if len(said) == 1 and len(questions) >= SEVERAL and not accepts else None


def rows_of(
    shape: ModelFingerprint, parts: Sequence[Judged], entries: Sequence[Entry], value_bytes: int
) -> Iterator[Row]:
    """Make the figures of each task: dense, then every method at every budget."""
    for part in parts:
        own, dense = part.records, part.scores[DENSE]
        boot = Bootstrap(len(dense)) if len(dense) else None
        base = None if boot is None else boot.means(dense[None])
        groups: list[tuple[str, float | None, list[Entry]]] = [(DENSE, None, []), *grouped(entries)]
        for name, budget, group in groups:
            labels = [entry.label for entry in group] or [DENSE]
            priced = group[0].recipe if group else PruningRecipe.dense(shape, own[0]["sizes"][0] or 1)
            costs = _costs(priced, own, value_bytes)
            scores = np.stack([part.scores[each] for each in labels])
            accuracy = spread = relative = relative_spread = None
            if boot is not None and base is not None:
                draws = boot.means(scores)
                accuracy, spread = _rounded(scores.mean()), interval(draws)
                if part.task.comparable:
                    relative = _rounded(scores.mean() / dense.mean())
                    relative_spread = interval(draws / np.maximum(base, 1 / len(dense)))
            same = [record["said"][each] == record["said"][DENSE] for each in labels for record in own]
            of_kind = {kind: np.array(part.kinds) == kind for kind in sorted({*part.kinds} - {""})}
            yield Row(
                task=part.task.name,
                method=name,
                budget=budget,
                seeds=len(labels),
                samples=len(own),
                accuracy=accuracy,
                accuracy_interval=spread,
                relative_accuracy=relative,
                relative_interval=relative_spread,
                agreement=_rounded(np.mean(same)),
                divergence=_rounded(np.mean([record["divergence"][each] for each in labels for record in own])),
                accuracy_by_kind={
                    kind: _rounded(np.mean([row[where].mean() for row in scores])) for kind, where in of_kind.items()
                },
                **costs,
            )


def _costs(recipe: PruningRecipe, records: Sequence[Record], value_bytes: int) -> dict[str, float]:
    """Average what a recipe costs over the samples."""

    @functools.cache
    def cost(visual: int, before: int, text: int, crops: int) -> Cost:
        return recipe.cost(
            visual_tokens=visual, text_before=before, text_tokens=text, crops=crops, value_bytes=value_bytes
        )

    found = [cost(*record["sizes"]) for record in records if record["sizes"][0]]

    def mean(values: list[float]) -> float:
        return _rounded(np.mean(values)) if values else 0.0

    return {
        "flops_reduction": mean([c.flops_reduction for c in found]),
        "prefill_flops_ratio": mean([c.prefill_flops / c.dense_prefill_flops for c in found]),
        "mean_visual_tokens": mean([c.mean_visual_tokens for c in found]),
        "visual_tokens_left": mean([c.kept[-1] for c in found]),
        "kv_bytes": mean([c.kv_bytes for c in found]),
    }


def best_of(parts: Sequence[Judged], entries: Sequence[Entry]) -> Iterator[Best]:
    """Find, at each budget, the most accurate method, and how sure its lead over FitPrune is."""
    groups = [group for group in grouped(entries) if group[1] is not None]
    for part in parts:
        if not part.task.comparable:
            continue
        for budget in dict.fromkeys(budget for _, budget, _ in groups):
            scores = {
                name: np.stack([part.scores[entry.label] for entry in group])
                for name, at, group in groups
                if at == budget
            }
            if "fitprune" not in scores or len(scores) < 2 or budget is None:
                continue
            count = part.task.answerable
            boot = Bootstrap(count)
            ours = boot.means(scores["fitprune"])
            means = {name: _rounded(values.mean()) for name, values in scores.items()}
            leads = {name: _rounded(mean - means["fitprune"]) for name, mean in means.items()}
            spreads = {name: interval(boot.means(values) - ours) for name, values in scores.items()}
            # FitPrune comes first among equals, so that a tie is no defeat.
            best = max(means, key=lambda name: (means[name], name == "fitprune"))
            yield Best(
                part.task.name,
                budget,
                best,
                leads[best],
                spreads[best],
                count,
                tuple(name for name, mean in means.items() if mean == means[best] and name != best),
                tuple(name for name in means if name != "fitprune" and _is_unsure(leads[name], spreads[name], count)),
            )


def _is_unsure(lead: float, spread: results.Interval, count: int) -> bool:
    """Whether a method may be much more accurate than FitPrune, as far as these questions say."""
    low, high = spread
    # What happens in none of n questions may happen in 3 / n of them (rule of three).
    room = max(high, 3 / count)
    return (
        room > results.ROOM
        and not results.is_sure(lead, spread, count)
        and not results.is_sure(-lead, (-high, -low), count)
    )


def _rounded(value: Any) -> float:
    """Six digits: what comes after them is rounding noise of sums."""
    return round(float(value), 6)
