"""The search for one budget: many candidates on few samples, the better ones on more, then the best moved about."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from fitprune.output_search.candidates import (
    DIVERSITIES,
    SEARCHED_SCORERS,
    Candidate,
    Schedule,
    neighbours,
    schedule_of,
    with_scorer,
)
from fitprune.output_search.meter import Meter
from fitprune.recipes.recipe import PruningRecipe

_FIRST_SAMPLES = 48  # of the search half, that many candidates are compared on
_SCHEDULES = 6  # that every scorer is tried with
_NARROW = 16  # candidates that go on to the next samples
_LEAST = 4  # candidates that are compared on all samples
_WORSE = 1.1  # a neighbour that is this much worse on the first batches is not tried on the others


class BudgetSearch:
    """One budget's search.

    Args:
        meter: what measures recipes.
        batches: numbers of those that are searched on, in this order.
        recipe_of: scales a candidate to the budget; None for one that cannot meet it.
        places: of the model, two for each layer.
        seed: of the order in which neighbours are tried.
        limit: `meter.passes` at which the search stops.
        until: `time.monotonic` at which it stops; None for no limit of time.
        title: of the progress bar.
        progress: show it.

    Attributes:
        tried: candidates that were measured.
    """

    def __init__(
        self,
        meter: Meter,
        batches: Sequence[int],
        recipe_of: Callable[[Candidate], PruningRecipe | None],
        *,
        places: int,
        seed: int,
        limit: float,
        until: float | None,
        title: str,
        progress: bool,
    ) -> None:
        self.meter, self.batches, self.recipe_of = meter, batches, recipe_of
        self.places, self.seed, self.limit, self.until = places, seed, limit, until
        self.tried = 0
        self._start = meter.passes
        sizes = np.cumsum([meter.samples([number]) for number in batches])
        wanted = min(_FIRST_SAMPLES, sizes[-1])
        self._first = min(int((sizes < wanted).sum()) + 1, len(sizes))  # batches that hold the first samples
        self._bar = tqdm(
            desc=title, total=round(max(0.0, limit - self._start), 1), unit="pass", disable=not progress or None,
            bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} passes [{elapsed}{postfix}]",
        )  # fmt: skip

    def run(self, first: Sequence[Candidate]) -> tuple[PruningRecipe | None, list[Candidate]]:
        """Search; gives the best recipe, None if time ended before one was measured, and the best candidates.

        Args:
            first: candidates to begin with, the likeliest first.
        """
        with self._bar:
            scores: dict[Candidate, list[float]] = {}
            # Many schedules on few samples, then the better schedules with every scorer.
            self._explore(scores, first, self._share(0.35))
            rescored = [
                with_scorer(schedule, name, diversity)
                for schedule in self._schedules(scores)
                for name in SEARCHED_SCORERS
                for diversity in DIVERSITIES
            ]
            self._explore(scores, rescored, self._share(0.6))
            best = self._narrowed(scores)
            whole = [candidate for candidate in best if len(scores[candidate]) == max(len(scores[c]) for c in best)]
            winner = self._moved(whole[0]) if whole else None
            self._show(None)
        good = [candidate for candidate in dict.fromkeys([winner, *best[:3]]) if candidate]
        return self.recipe_of(winner) if winner else None, good

    def _share(self, share: float) -> float:
        return self._start + share * (self.limit - self._start)

    def _late(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until

    def _over(self, limit: float) -> bool:
        return self.meter.passes >= limit or self._late()

    def _measure(self, numbers: Sequence[int], candidates: Sequence[Candidate]) -> list[tuple[Candidate, list[float]]]:
        """Measure those that can meet the budget on some batches; gives none if time ends before the last batch."""
        able = {candidate: recipe for candidate in candidates if (recipe := self.recipe_of(candidate)) is not None}
        batches = []
        for number in numbers:
            if self._late():
                return []
            batches.append(self.meter.measure(number, list(able.values())))
        return [(candidate, [value for batch in batches for value in batch[i]]) for i, candidate in enumerate(able)]

    def _explore(self, scores: dict[Candidate, list[float]], candidates: Iterable[Candidate], limit: float) -> None:
        """Measure candidates on the first samples until the limit."""
        new = [c for c in dict.fromkeys(candidates) if c not in scores and self.recipe_of(c) is not None]
        together = 8 if self.until is None else 2  # fewer, where the clock decides
        for start in range(0, len(new), together):
            if self._over(limit):
                break
            for candidate, values in self._measure(self.batches[: self._first], new[start : start + together]):
                scores[candidate] = values
                self.tried += 1
            if scores:
                self._show(min(map(_mean, scores.values())))

    def _schedules(self, scores: Mapping[Candidate, list[float]]) -> list[Schedule]:
        """The better schedules, each once, with whatever scorer it was good."""
        smooth = smoothed(scores)
        ranked = sorted(scores, key=lambda candidate: smooth[candidate])
        return list(dict.fromkeys(map(schedule_of, ranked)))[:_SCHEDULES]

    def _narrowed(self, scores: dict[Candidate, list[float]]) -> list[Candidate]:
        """Measure the better candidates on batch after batch, fewer each time; the best first."""
        smooth = smoothed(scores)
        best = sorted(scores, key=lambda candidate: smooth[candidate])[:_NARROW]
        for number in self.batches[self._first :]:
            if self._over(self._share(0.85)):
                break
            for candidate, values in self._measure([number], best):
                scores[candidate] = [*scores[candidate], *values]
            best.sort(key=lambda candidate: _mean(scores[candidate]))
            best = best[: max(_LEAST, math.ceil(len(best) * 0.7))]
        return best

    def _moved(self, candidate: Candidate) -> Candidate:
        """Go from candidate to neighbour as long as one is clearly better on all samples of the search half."""
        rng = np.random.default_rng([self.seed, 2])
        if self._over(self.limit) or (own := self._by_batch(candidate)) is None:
            return candidate
        visited = {candidate}
        while not self._over(self.limit):
            near = [other for other in neighbours(candidate, self.places) if other not in visited]
            for i in rng.permutation(len(near)):
                other = near[i]
                visited.add(other)
                if self._over(self.limit):
                    return candidate
                if (recipe := self.recipe_of(other)) is None or recipe == self.recipe_of(candidate):
                    continue
                self.tried += 1
                mine: list[float] = []
                theirs: list[float] = []
                for number in self.batches:
                    if self._late():
                        return candidate
                    mine += own[number]
                    theirs += self.meter.measure(number, [recipe])[0]
                    if _mean(theirs) > _WORSE * _mean(mine):
                        break
                if len(theirs) == sum(map(len, own.values())) and clearly_less(theirs, mine):
                    candidate, own = other, self._by_batch(other) or own
                    self._show(_mean(theirs))
                    break
            else:
                return candidate
        return candidate

    def _by_batch(self, candidate: Candidate) -> dict[int, list[float]] | None:
        recipe = self.recipe_of(candidate)
        if recipe is None:
            return None
        return {number: self.meter.measure(number, [recipe])[0] for number in self.batches}

    def _show(self, best: float | None) -> None:
        self._bar.update(min(self.meter.passes - self._start, self._bar.total or 0) - self._bar.n)
        if best is not None:
            self._bar.set_postfix_str(f", best {best:.4f} nats")


def smoothed(scores: Mapping[Candidate, Sequence[float]]) -> dict[Candidate, float]:
    """Rank candidates by the log of their mean divergence, drawn half-way to what those with the same parts reach.

    On few samples a candidate may be lucky; its places and scorers are shared with others, which were lucky elsewhere.
    What the parts reach is a ridge regression on them.
    """
    candidates = list(scores)
    if not candidates:
        return {}
    parts = [
        [
            ("first", candidate[0].place),
            ("last", candidate[-1].place),
            ("removals", len(candidate)),
            ("scorer", candidate[0].scorer),
            ("diversity", candidate[0].diversity),
            ("scorer", candidate[0].scorer, candidate[0].diversity),
            ("schedule", *schedule_of(candidate)),
        ]
        for candidate in candidates
    ]
    names = {name: i for i, name in enumerate(dict.fromkeys(name for own in parts for name in own))}
    design = np.zeros((len(candidates), len(names)))
    for row, own in enumerate(parts):
        design[row, [names[name] for name in own]] = 1
    value = np.log(np.array([_mean(scores[candidate]) for candidate in candidates]) + 1e-6)
    centred = value - value.mean()
    weight = np.linalg.solve(design.T @ design + np.eye(len(names)), design.T @ centred)
    shared = design @ weight
    return {
        candidate: float(own + common) / 2 for candidate, own, common in zip(candidates, centred, shared, strict=True)
    }


def clearly_less(theirs: Sequence[float], mine: Sequence[float]) -> bool:
    """Whether the mean is less by more than the differences' standard error: of many neighbours some are by chance."""
    less = np.subtract(mine, theirs)
    return bool(less.mean() > 0 and less.mean() >= less.std() / math.sqrt(len(less)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
