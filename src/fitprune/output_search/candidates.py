"""What the search tries, as plain data, and how it becomes a recipe. Nothing here runs a model.

A schedule says at which places tokens leave, and how many in proportion to each other; a candidate also says by which
scorer. Scaled to a budget, a candidate is a recipe. A place is a number: 2 * layer is before that layer, 2 * layer + 1
inside it. n is the number of visual tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fitprune.costs.counts import Counts
from fitprune.costs.flops import ahead_macs, visual_macs
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.fitting.budget import Budget
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import stage_name

SEARCHED_SCORERS = ("heads", "last", "cross-mean", "fitprune", "cross", "self", "value", "debiased", "accumulated")
DIVERSITIES = (0.0, 1.0)
_DEPTHS = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # where removals are tried first
_SHARES = (0.15, 0.4)  # of the first removal's tokens that the second keeps

Schedule = tuple[tuple[int, float], ...]  # (place, size) of each removal


@dataclasses.dataclass(frozen=True)
class Removal:
    """One place where tokens leave.

    Attributes:
        place: 2 * layer before that layer, 2 * layer + 1 inside it.
        size: tokens kept, in proportion to the candidate's other removals.
        scorer: name of the scorer.
        diversity: see `fitprune.scoring.scorers`.
    """

    place: int
    size: float
    scorer: str
    diversity: float = 0.0


Candidate = tuple[Removal, ...]


def with_scorer(schedule: Schedule, scorer: str, diversity: float) -> Candidate:
    """Make a candidate of a schedule, with one scorer at all places."""
    return tuple(Removal(place, size, scorer, diversity) for place, size in schedule)


def schedule_of(candidate: Candidate) -> Schedule:
    """Read a candidate's schedule, which leaves out its scorers."""
    return tuple((removal.place, removal.size) for removal in candidate)


def first_candidates(
    known: Sequence[Candidate], papers: Iterable[Schedule], layers: int, prunable: Collection[int], seed: int
) -> list[Candidate]:
    """List the candidates to begin with, the likeliest first.

    Args:
        known: what was good for other budgets.
        papers: schedules of the paper's fit.
        layers: of the decoder.
        prunable: layers that tokens may leave.
        seed: of the order in which schedules of two and three removals are tried.
    """
    by_layer = [round(depth * layers) for depth in _DEPTHS]
    places = sorted({place for layer in {*by_layer, 1} if layer in prunable for place in (2 * layer, 2 * layer + 1)})
    more: list[Schedule] = []
    for first, a in enumerate(places):
        for b in places[first + 1 :]:
            shares = [*_SHARES, *([0.0] if b > layers else [])]  # everything may leave in the second half
            more += [((a, 1.0), (b, share)) for share in shares]
            more += [((a, 1.0), (b, 0.4), (c, 0.1)) for c in places if c > b]
    rng = np.random.default_rng([seed, 1])
    schedules: list[Schedule] = [*(((place, 1.0),) for place in places), *(more[i] for i in rng.permutation(len(more)))]
    candidates = list(known[:8])
    for paper in papers:
        candidates += [with_scorer(paper, *how) for how in (("heads", 1.0), ("cross", 0.0), ("fitprune", 1.0))]
    for number, schedule in enumerate(schedules):
        candidates.append(with_scorer(schedule, "heads", 1.0))
        if number % 2 == 0:
            candidates.append(with_scorer(schedule, "last", 0.0))
    return candidates


def neighbours(candidate: Candidate, places: int) -> list[Candidate]:
    """List candidates that differ in one thing: tokens moved, a removal moved, added, left out or scored otherwise.

    Args:
        candidate: whose neighbours.
        places: of the model, two for each layer.
    """
    near: list[Candidate] = []

    def changed(number: int, **change: Any) -> Candidate:
        return (*candidate[:number], dataclasses.replace(candidate[number], **change), *candidate[number + 1 :])

    for number, removal in enumerate(candidate):
        low = candidate[number - 1].place if number else -1
        high = candidate[number + 1].place if number + 1 < len(candidate) else places
        near += [changed(number, place=p) for p in (removal.place - 1, removal.place + 1) if low < p < high]
        if len(candidate) > 1:
            near += [changed(number, size=removal.size * by) for by in (0.7, 0.85, 1.18, 1.4) if removal.size]
            near.append((*candidate[:number], *candidate[number + 1 :]))
        if removal.size and number == len(candidate) - 1:
            later = range(removal.place + 1, min(removal.place + 5, places))
            near += [
                (*candidate, dataclasses.replace(removal, place=p, size=removal.size * share))
                for p in later
                for share in (0.0, 0.4)
            ]
        if len(candidate) <= 4:
            near += [
                changed(number, scorer=name, diversity=diversity)
                for name in SEARCHED_SCORERS
                for diversity in (*DIVERSITIES, 0.4)
                if (name, diversity) != (removal.scorer, removal.diversity)
            ]
    return near


def recipe_of(
    candidate: Candidate,
    budget: Budget,
    model: ModelFingerprint,
    n: int,
    scorer_at: Callable[[str, int, float], Mapping[str, Any]],
) -> PruningRecipe | None:
    """Scale a candidate to the budget, to within a token; None if it cannot meet it, or reads what is not there.

    Args:
        candidate: removals and their scorers.
        budget: to meet.
        model: that the recipe is for.
        n: visual tokens that the budget is met for.
        scorer_at: (name, place, diversity) -> the scorer as a recipe holds it.
    """
    if candidate[0].place == 0 and candidate[0].scorer == "accumulated":
        return None
    if any(removal.place // 2 not in model.decoder.prunable for removal in candidate):
        return None
    counts = scaled(candidate, budget, model.decoder, n)
    if counts is None:
        return None
    entering, kept = _by_layer(candidate, counts, n, model.decoder.layers)
    scorers = {
        stage_name(removal.place // 2, removal.place % 2 == 0): scorer_at(
            removal.scorer, removal.place, removal.diversity
        )
        for removal, count, before in zip(candidate, counts, [n, *counts[:-1]], strict=True)
        if count < before
    }
    different = {json.dumps(spec, sort_keys=True): spec for spec in scorers.values()}
    scorer: Mapping[str, Any] = {"name": "by-stage", "parameters": {"stages": scorers}}
    if len(different) <= 1:
        scorer = next(iter(different.values()), {"name": "fitprune"})
    return PruningRecipe.from_counts(Counts(n, tuple(kept), tuple(entering)), model, scorer=scorer)


def scaled(candidate: Candidate, budget: Budget, decoder: DecoderSizes, n: int) -> list[int] | None:
    """The most tokens that each removal may keep, in the candidate's proportions; None if not even 0 fits."""

    def counts(scale: float) -> list[int]:
        kept, now = [], n
        for removal in candidate:
            now = min(now, int(scale * removal.size * n))
            kept.append(now)
        return kept

    def fits(kept: Sequence[int]) -> bool:
        return budget.met_by(_measured(candidate, kept, budget, decoder, n))

    low, high = 0.0, 1 / min([removal.size for removal in candidate if removal.size] or [1.0])
    if not fits(counts(low)):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(counts(middle)) else (low, middle)
    kept = counts(low)
    for number in range(len(kept)):  # what rounding left over, first removal first
        ceiling = kept[number - 1] if number else n
        while (
            (candidate[number].size or ceiling == n)  # the first place at which tokens leave is never "all leave"
            and kept[number] < ceiling
            and fits([*kept[:number], kept[number] + 1, *kept[number + 1 :]])
        ):
            kept[number] += 1
    return kept


def _measured(candidate: Candidate, counts: Sequence[int], budget: Budget, decoder: DecoderSizes, n: int) -> float:
    """What a candidate reaches, less what its scorers compute ahead of the layers before which they rank."""
    entering, kept = _by_layer(candidate, counts, n, decoder.layers)
    reached = budget.measured(decoder, n, kept, entering)
    if budget.kind != "flops_reduction":
        return reached
    befores = zip(candidate, [n, *counts[:-1]], counts, strict=True)
    ahead = [before for removal, before, count in befores if removal.place % 2 == 0 and count < before]
    return reached - sum(ahead_macs(decoder, tokens) for tokens in ahead) / visual_macs(
        decoder, n, [0] * decoder.layers
    )


def _by_layer(candidate: Candidate, counts: Sequence[int], n: int, layers: int) -> tuple[list[int], list[int]]:
    """Tokens that enter each layer, and that it keeps."""
    at = {removal.place: count for removal, count in zip(candidate, counts, strict=True)}
    steps = []
    for place in range(2 * layers):
        n = at.get(place, n)
        steps.append(n)
    return steps[::2], steps[1::2]
