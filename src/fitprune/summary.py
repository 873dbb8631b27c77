"""From the records of an evaluation to its figures: a row for each method and budget, and the best. Runs no model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fitprune import results as figures
from fitprune.calibration import Sample
from fitprune.flops import ModelShape
from fitprune.journal import Record
from fitprune.recipe import Cost, PruningRecipe
from fitprune.results import DENSE, Best, Bootstrap, Row, interval


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
        return figures.label(self.name, self.budget) + ("" if self.seed is None else f" seed {self.seed}")


def _hits(records: Sequence[Record], name: str) -> np.ndarray[Any, Any]:
    """1 where a sample with answers is answered right, 0 where wrong: [samples with answers]."""
    return np.array(
        [
            record["said"][name].lower() in {answer.strip().lower() for answer in record["accepted"]}
            for record in records
            if record["accepted"]
        ],
        dtype=np.float32,
    )


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


def rows_of(
    shape: ModelShape,
    tasks: Mapping[str, Sequence[Sample]],
    entries: Sequence[Entry],
    records: Sequence[Record],
    value_bytes: int,
) -> Iterator[Row]:
    """Make the figures of each task: dense, then every method at every budget."""
    for task in tasks:
        own = [record for record in records if record["task"] == task]
        scored = [record for record in own if record["accepted"]]
        boot = Bootstrap(len(scored)) if scored else None
        dense = _hits(own, DENSE)
        base = None if boot is None else boot.means(dense[None])
        groups: list[tuple[str, float | None, list[Entry]]] = [(DENSE, None, []), *grouped(entries)]
        for name, budget, group in groups:
            labels = [entry.label for entry in group] or [DENSE]
            priced = group[0].recipe if group else PruningRecipe.dense(shape, own[0]["sizes"][0] or 1)
            costs = _costs(priced, own, value_bytes)
            accuracy = spread = relative = relative_spread = None
            if boot is not None and base is not None:
                hits = np.stack([_hits(own, each) for each in labels])
                draws = boot.means(hits)
                accuracy, spread = _rounded(hits.mean()), interval(draws)
                if dense.mean() > 0:
                    relative = _rounded(hits.mean() / dense.mean())
                    relative_spread = interval(draws / np.maximum(base, 1 / len(dense)))
            same = [record["said"][each] == record["said"][DENSE] for each in labels for record in own]
            kinds = sorted({record["kind"] for record in scored} - {""})
            of_kind = {kind: [record for record in scored if record["kind"] == kind] for kind in kinds}
            yield Row(
                task=task,
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
                    kind: _rounded(np.mean([_hits(part, each).mean() for each in labels]))
                    for kind, part in of_kind.items()
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


def best_of(
    tasks: Mapping[str, Sequence[Sample]], entries: Sequence[Entry], records: Sequence[Record]
) -> Iterator[Best]:
    """Find, at each budget, the most accurate method, and how sure its lead over FitPrune is."""
    groups = [group for group in grouped(entries) if group[1] is not None]
    for task in tasks:
        own = [record for record in records if record["task"] == task]
        if not any(record["accepted"] for record in own):
            continue
        for budget in dict.fromkeys(budget for _, budget, _ in groups):
            hits = {
                name: np.stack([_hits(own, entry.label) for entry in group])
                for name, at, group in groups
                if at == budget
            }
            if "fitprune" not in hits or budget is None:
                continue
            means = {name: _rounded(values.mean()) for name, values in hits.items()}
            # FitPrune comes first among equals, so that a tie is no defeat.
            best = max(means, key=lambda name: (means[name], name == "fitprune"))
            boot = Bootstrap(hits[best].shape[1])
            lead = boot.means(hits[best]) - boot.means(hits["fitprune"])
            yield Best(task, budget, best, _rounded(means[best] - means["fitprune"]), interval(lead))


def _rounded(value: Any) -> float:
    """Six digits: what is behind them is rounding noise of sums."""
    return round(float(value), 6)
