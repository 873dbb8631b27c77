"""`fit_output`: recipe and scorer chosen together, by what the model says on a calibration set.

A plan says at which places tokens leave, how many in proportion to each other, and by which scorer; scaled to the
budget it is a recipe. Plans are compared by the divergence of the pruned model's next-token distributions from the
dense model's, capped for each sample: many plans on few samples, the better ones on more, and then the best is moved
about a little, as long as that clearly helps. Half of the samples takes no part in it, and has the last word: unless
the winner beats the paper's rule there too, the paper's recipe is returned.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from tqdm import tqdm

from fitprune._support.journal import Journal, Record
from fitprune.calibration.measure import checked
from fitprune.costs.flops import ahead_macs, visual_macs
from fitprune.costs.sizes import DecoderSizes
from fitprune.families.adapter import adapt
from fitprune.families.inputs import input_digests
from fitprune.families.provenance import provenance_of
from fitprune.fitting.budget import Budget, OutOfReach, budget_from
from fitprune.fitting.fit import Fitter
from fitprune.fitting.stats import AttentionStats
from fitprune.output_search.divergence import Judge, reference
from fitprune.output_search.head_weights import HeadChoice, specs
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import stage_name

logger = logging.getLogger(__name__)

SCORERS = ("heads", "last", "cross-mean", "fitprune", "cross", "self", "value", "debiased", "accumulated")
DIVERSITIES = (0.0, 1.0)
PASSES, PASSES_TOGETHER = 36.0, 76.0  # dense prefills of all samples, for one budget and for several
HEAD_SAMPLES = 64  # that heads are weighed on
_DEPTHS = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # where stages are tried first
_SHARES = (0.15, 0.4)  # of the first stage's tokens that the second keeps
MOST = 0.5  # nats; an answer that has changed cannot change more, and a few such samples must not decide alone
_FIRST_SAMPLES = 48  # of the search half, that many plans are compared on
_SCHEDULES = 6  # that every scorer is tried with
_NARROW = 16  # plans that go on to the next samples
_LEAST = 4  # plans that are compared on all samples
_WORSE = 1.1  # a neighbour that is this much worse on the first batches is not tried on the others


@dataclasses.dataclass(frozen=True)
class Stage:
    """One place where tokens leave.

    Attributes:
        place: 2 * layer before that layer, 2 * layer + 1 inside it.
        size: tokens kept, in proportion to the plan's other stages.
        scorer: name of the scorer.
        diversity: see `fitprune.scoring.scorers`.
    """

    place: int
    size: float
    scorer: str
    diversity: float = 0.0


Plan = tuple[Stage, ...]


def fit_output(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    stats: AttentionStats,
    *,
    flops_reduction: float | None = None,
    kv_cache_reduction: float | None = None,
    mean_visual_tokens: float | None = None,
    tolerance: float | None = None,
    validation: Iterable[Mapping[str, Any]] | None = None,
    visual_tokens: int | None = None,
    minutes: float | None = None,
    passes: float = PASSES,
    max_new_tokens: int = 16,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> PruningRecipe:
    """Fit the recipe, and choose its scorer, that change least what the model says.

    State exactly one budget, as for `fit`; a tolerance stands for the FLOPs that `fit` removes at it.

    Args:
        model: a supported `...ForConditionalGeneration` model, without pruning.
        batches: calibration prompts as the processor makes them, padded on the left if at all. Without `validation`,
            two batches or more, every second of which is kept for validation; samples of all kinds should be in both.
        stats: from `measure`, for the paper's rule, which is a candidate and what the winner is compared with.
        flops_reduction: see `fit`.
        kv_cache_reduction: see `fit`.
        mean_visual_tokens: see `fit`.
        tolerance: see `fit`.
        validation: prompts to validate with, of other images; None to take every second batch.
        visual_tokens: image size that the budget is met for; by default the statistics' most common count.
        minutes: stop the search so long after the start and take the best so far; None for no limit of time.
        passes: stop after so much computing, in dense prefills of all samples; their answers and heads count too.
        max_new_tokens: longest answer of the dense model that is looked at.
        seed: of the search; the same one gives the same recipe, unless `minutes` ends it.
        journal: file for what was measured; a search that was killed goes on from it. None keeps nothing.
        progress: show a progress bar with the best divergence.

    Returns:
        The recipe, with its scorer. Its provenance tells the divergence, in nats, of the paper's rule and of what was
        found, on both halves; `chosen` is "paper" where the search found nothing better on the validation half.

    Raises:
        ValueError: no budget or several, a value out of range, a budget that no removal can meet, fewer than two
            batches, or a batch that `fitprune.output_search.divergence.reference` refuses.
    """
    budget = budget_from(
        flops_reduction=flops_reduction,
        kv_cache_reduction=kv_cache_reduction,
        mean_visual_tokens=mean_visual_tokens,
        tolerance=tolerance,
    )
    _require_limits(passes, minutes)
    Fitter(stats, visual_tokens=visual_tokens).fit(budget)  # out of reach? before the model answers
    fitter = OutputFitter(
        model,
        batches,
        stats,
        validation=validation,
        visual_tokens=visual_tokens,
        max_new_tokens=max_new_tokens,
        seed=seed,
        journal=journal,
        progress=progress,
    )
    return fitter.fit([budget], passes=passes, minutes=minutes)[0]


class OutputFitter:
    """Fits several budgets from one set of dense answers; what is good for one is tried for the next.

    Attributes:
        passes: what was computed so far, in dense prefills of `unit` samples; by default of all.
        search: numbers of the batches that are searched on.
        validation: numbers of those that have the last word.
    """

    def __init__(
        self,
        model: Any,
        batches: Iterable[Mapping[str, Any]],
        stats: AttentionStats,
        *,
        validation: Iterable[Mapping[str, Any]] | None = None,
        unit: int | None = None,
        visual_tokens: int | None = None,
        max_new_tokens: int = 16,
        seed: int = 0,
        journal: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> None:
        self._begun = time.monotonic()
        max_new_tokens = _whole_number("max_new_tokens", max_new_tokens, 1)
        seed = _whole_number("seed", seed, 0)
        adapted = adapt(model)
        model = adapted.model
        stats.model.require_same(adapted.fingerprint, what="stats")  # before the model answers
        self.fitter = Fitter(stats, visual_tokens=visual_tokens)
        self.visual_tokens, self.layers = self.fitter.visual_tokens, stats.model.decoder.layers
        self.prunable = stats.model.decoder.prunable
        self.seed, self.progress = seed, progress
        given = list(checked(batches))
        last = len(given)
        if validation is not None:
            given += list(checked(validation))
        numbers = range(len(given))
        search, self.validation = (
            (numbers[::2], list(numbers[1::2])) if validation is None else (numbers[:last], list(numbers[last:]))
        )
        if not search or not self.validation:
            raise ValueError(
                f"{len(search)} batches to search on and {len(self.validation)} to validate with: at least one each "
                "is needed; use more samples or a smaller batch size"
            )
        answered = tqdm(given, desc="answer", unit="batch", disable=not progress or None)
        self.judge = Judge(model, [reference(model, batch, max_new_tokens=max_new_tokens) for batch in answered], unit)
        self.search = [search[i] for i in np.random.default_rng(seed).permutation(len(search))]
        self.choice = HeadChoice(self.visual_tokens)
        self.passes = sum(map(len, self.judge.references)) / self.judge.unit
        for number in search:  # as many as are needed to weigh heads, the first ones given
            self.choice.add(self.judge.watch(number))
            self.passes += len(self.judge.references[number]) / self.judge.unit
            if self.choice.samples >= HEAD_SAMPLES:
                break
        self.spec = functools.cache(functools.partial(specs, self.choice))
        self._measured: dict[tuple[str, int], list[float]] = {}
        # What a journal holds of an earlier run is paid for again, so that both runs end alike.
        self._charged: set[tuple[str, int]] = set()
        self._book: Journal | None = None
        if journal is not None:
            self._book = Journal(
                journal, {"objective": "output", **self._run(model, given, seed, max_new_tokens)}, _sound
            )
            sizes = dict(enumerate(map(len, self.judge.references)))
            for record in self._book.done().values():
                if sizes.get(record["batch"]) != len(record["divergence"]):
                    continue
                self._measured[record["plan"], record["batch"]] = record["divergence"]
            self._book.open()

    def fit(
        self, budgets: Sequence[Budget], *, passes: float | None = None, minutes: float | None = None
    ) -> list[PruningRecipe]:
        """Fit budgets; see `fit_output`.

        Args:
            budgets: as `fitprune.fitting.budget.checked_budget` makes them.
            passes: for all budgets together; by default 36 for one and 76 for several.
            minutes: for all budgets together, from the first dense answer on.
        """
        _require_limits(passes, minutes)
        papers = [self.fitter.fit(budget) for budget in budgets]  # a budget out of reach is found before the search
        allowance = (PASSES if len(budgets) == 1 else PASSES_TOGETHER) if passes is None else passes
        ends = None if minutes is None else self._begun + 60 * minutes
        order = sorted(range(len(budgets)), key=lambda i: papers[i].cost().flops_reduction)
        made: dict[int, PruningRecipe] = {}
        known: list[Plan] = []
        for done, number in enumerate(order):
            left = len(order) - done
            limit = self.passes + max(0.0, allowance - self.passes) / left
            until = None if ends is None else time.monotonic() + max(0.0, ends - time.monotonic()) / left
            made[number], plans = self._fit(budgets[number], papers[number], limit, until, known)
            known = [*plans, *known]
        return [made[number] for number in range(len(budgets))]

    def _run(self, model: Any, given: Sequence[Mapping[str, Any]], seed: int, max_new_tokens: int) -> dict[str, Any]:
        """All that the divergences depend on, as plain data."""
        digest = hashlib.sha256()
        # Of what went in and of the answers, no probabilities: their last bits depend on the number of threads.
        for inputs, batch in zip(given, self.judge.references, strict=True):
            digest.update("".join(input_digests(self.judge.adapted, inputs)).encode())
            digest.update(batch.answers.cpu().numpy().tobytes())
        sizes = [len(batch) for batch in self.judge.references]
        return {**provenance_of(model), "batches": sizes, "digest": digest.hexdigest()[:16], "seed": seed,
                "max_new_tokens": max_new_tokens, "capped": MOST}  # fmt: skip

    def _fit(
        self, budget: Budget, paper: PruningRecipe, limit: float, until: float | None, known: Sequence[Plan]
    ) -> tuple[PruningRecipe, list[Plan]]:
        """Fit one budget; also gives the plans that were good."""
        stated = budget
        if budget.kind == "tolerance":
            budget = Budget("flops_reduction", paper.cost(visual_tokens=self.visual_tokens).flops_reduction)
        search = _Search(self, budget, limit, until)
        validation = sum(self.judge.price(number, [paper]) for number in self.validation)
        search.limit -= 2 * validation  # kept for the last word
        found, plans = search.run(paper, self._first_plans(budget, known)) if min(paper.keep) < 1 else (paper, [])
        divergence = {
            half: {"paper": self.mean(numbers, paper), "found": self.mean(numbers, found)}
            for half, numbers in (("search", self.search), ("validation", self.validation))
        }
        better = divergence["validation"]["found"] < divergence["validation"]["paper"]
        if min(paper.keep) < 1 and not search.tried:
            logger.warning(
                "%s=%g: the search ended before the first plan was measured, and the paper's recipe is returned: "
                "allow more minutes or passes", stated.kind, stated.value,
            )  # fmt: skip
        elif min(paper.keep) < 1 and not better:
            logger.warning(
                "%s=%g: on the validation half nothing found is better than the paper's rule (%.4f against %.4f nats), "
                "whose recipe is returned",
                stated.kind, stated.value, divergence["validation"]["found"], divergence["validation"]["paper"],
            )  # fmt: skip
        chosen = found if better else paper
        n = self.visual_tokens
        kept = chosen.kept(n)
        entering = [a - b for a, b in zip([n, *kept[:-1]], chosen.counts_before(n), strict=True)]
        provenance = {
            "source": "fitprune.fit_output",
            "budget": {stated.kind: stated.value},
            "reached": budget.measured(chosen.model.decoder, n, kept, entering),
            "chosen": "found" if better else "paper",
            "divergence": {half: {k: round(v, 6) for k, v in of.items()} for half, of in divergence.items()},
            "samples": {
                half: sum(len(self.judge.references[number]) for number in numbers)
                for half, numbers in (("search", self.search), ("validation", self.validation))
            },
            "plans": search.tried,
            "seed": self.seed,
            "measured": dict(self.fitter.stats.provenance),
        }
        return dataclasses.replace(chosen, provenance=provenance), plans

    def _first_plans(self, budget: Budget, known: Sequence[Plan]) -> list[Plan]:
        """Plans to begin with, the likeliest first: what was good elsewhere, the paper's schedules, and a grid."""
        rng = np.random.default_rng([self.seed, 1])
        by_layer = [round(depth * self.layers) for depth in _DEPTHS]
        places = sorted(
            {place for layer in {*by_layer, 1} if layer in self.prunable for place in (2 * layer, 2 * layer + 1)}
        )
        ones = [((place, 1.0),) for place in places]
        more: list[tuple[tuple[int, float], ...]] = []
        for first, a in enumerate(places):
            for b in places[first + 1 :]:
                shares = [*_SHARES, *([0.0] if b > self.layers else [])]  # everything may leave in the second half
                more += [((a, 1.0), (b, share)) for share in shares]
                more += [((a, 1.0), (b, 0.4), (c, 0.1)) for c in places if c > b]
        shuffled = [more[i] for i in rng.permutation(len(more))]
        schedules = [*ones, *shuffled]
        plans = list(known[:8])
        for paper in self._paper_schedules(budget):
            plans += [_plan(paper, *how) for how in (("heads", 1.0), ("cross", 0.0), ("fitprune", 1.0))]
        for number, schedule in enumerate(schedules):
            plans.append(_plan(schedule, "heads", 1.0))
            if number % 2 == 0:
                plans.append(_plan(schedule, "last", 0.0))
        return plans

    def _paper_schedules(self, budget: Budget) -> list[tuple[tuple[int, float], ...]]:
        """The paper's fit to this budget, and to less and more, as schedules: tokens leave inside layers."""
        found = []
        reduction = self.fitter.fit(budget).cost(visual_tokens=self.visual_tokens).flops_reduction
        for other in (reduction, reduction * 0.8, 1 - (1 - reduction) * 0.7):
            try:
                keep = self.fitter.fit(Budget("flops_reduction", other)).keep
            except OutOfReach:
                continue
            before = (1.0, *keep[:-1])
            found.append(tuple((2 * i + 1, k) for i, (k, b) in enumerate(zip(keep, before, strict=True)) if k < b))
        return [schedule for schedule in found if schedule]  # one that keeps all is none

    def recipe(self, plan: Plan, budget: Budget) -> PruningRecipe | None:
        """Scale a plan to the budget, to within a token; None if it cannot meet it, or reads what is not there."""
        if plan[0].place == 0 and plan[0].scorer == "accumulated":
            return None
        if any(stage.place // 2 not in self.prunable for stage in plan):
            return None
        n, decoder = self.visual_tokens, self.fitter.model.decoder
        counts = _scaled(plan, budget, decoder, n)
        if counts is None:
            return None
        entering, kept = _by_layer(plan, counts, n, self.layers)
        after = [n, *counts[:-1]]
        stages = [stage for stage, count, before in zip(plan, counts, after, strict=True) if count < before]
        scorers = {
            stage_name(s.place // 2, s.place % 2 == 0): self.spec(s.scorer, s.place, s.diversity) for s in stages
        }
        same = {json.dumps(spec, sort_keys=True) for spec in scorers.values()}
        if not scorers:
            scorer: Mapping[str, Any] = {"name": "fitprune"}
        elif len(same) == 1:
            scorer = next(iter(scorers.values()))
        else:
            scorer = {"name": "by-stage", "parameters": {"stages": scorers}}
        between = entering != [n, *kept[:-1]]
        return PruningRecipe(
            tuple(count / n for count in kept),
            self.fitter.model,
            n,
            {},
            tuple(count / n for count in entering) if between else (),
            scorer,
        )

    def mean(self, numbers: Sequence[int], recipe: PruningRecipe) -> float:
        """Mean divergence of a recipe on some batches, in nats."""
        values = [value for number in numbers for value in self.measure(number, [recipe])[0]]
        return sum(values) / len(values)

    def measure(self, number: int, recipes: Sequence[PruningRecipe]) -> list[list[float]]:
        """Measure recipes on one batch, each once; the price of the new ones is added to `passes`."""
        keys = [_digest(recipe) for recipe in recipes]
        new = {key: recipe for key, recipe in zip(keys, recipes, strict=True) if (key, number) not in self._charged}
        self.passes += self.judge.price(number, list(new.values()))
        self._charged |= {(key, number) for key in new}
        todo = {key: recipe for key, recipe in new.items() if (key, number) not in self._measured}
        if todo:
            made = self.judge.divergences(number, list(todo.values()))
            records: list[Record] = []
            for key, values in zip(todo, made, strict=True):
                place = len(self._measured)
                self._measured[key, number] = values = [_capped(value) for value in values]
                records.append({"place": place, "plan": key, "batch": number, "divergence": values})
            if self._book:
                self._book.append(records)
        return [self._measured[key, number] for key in keys]


class _Search:
    """The search for one budget's best plan."""

    def __init__(self, fitter: OutputFitter, budget: Budget, limit: float, until: float | None) -> None:
        self.fitter, self.budget, self.limit, self.until = fitter, budget, limit, until
        self.begun = fitter.passes
        self.tried = 0
        self._recipes: dict[Plan, PruningRecipe | None] = {}
        sizes = np.cumsum([len(fitter.judge.references[number]) for number in fitter.search])
        wanted = min(_FIRST_SAMPLES, sizes[-1])
        self._first = min(int((sizes < wanted).sum()) + 1, len(sizes))  # batches that hold the first samples
        self._bar = tqdm(
            desc=f"fit {budget.kind}={budget.value:g}", total=round(limit - self.begun, 1), unit="pass",
            disable=not fitter.progress or None,
            bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} passes [{elapsed}{postfix}]",
        )  # fmt: skip

    def run(self, paper: PruningRecipe, first: Sequence[Plan]) -> tuple[PruningRecipe, list[Plan]]:
        """Search; gives the best recipe, and the best plans of the halving."""
        batches = self.fitter.search
        with self._bar:
            scores: dict[Plan, list[float]] = {}
            # Many schedules on few samples, then the better schedules with every scorer.
            self._explore(scores, first, self._share(0.35))
            others = [
                _rescored(plan, name, diversity)
                for plan in self._schedules(scores)
                for name in SCORERS
                for diversity in DIVERSITIES
            ]
            self._explore(scores, others, self._share(0.6))
            smoothed = _smoothed(scores)
            best = sorted(scores, key=lambda plan: smoothed[plan])[:_NARROW]
            for number in batches[self._first :]:
                if self._over(self._share(0.85)):
                    break
                for plan, values in self._measure([number], best):
                    scores[plan] = [*scores[plan], *values]
                best.sort(key=lambda plan: _mean(scores[plan]))
                best = best[: max(_LEAST, math.ceil(len(best) * 0.7))]
            whole = [plan for plan in best if len(scores[plan]) == max(len(scores[p]) for p in best)]
            found = self._move(whole[0]) if whole else None
            self._show(None)
        recipe = self._recipe(found) if found else None
        return recipe or paper, [plan for plan in dict.fromkeys([found, *best[:3]]) if plan]

    def _share(self, share: float) -> float:
        return self.begun + share * (self.limit - self.begun)

    def _late(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until

    def _over(self, limit: float) -> bool:
        return self.fitter.passes >= limit or self._late()

    def _recipe(self, plan: Plan) -> PruningRecipe | None:
        if plan not in self._recipes:
            self._recipes[plan] = self.fitter.recipe(plan, self.budget)
        return self._recipes[plan]

    def _measure(self, numbers: Sequence[int], plans: Sequence[Plan]) -> list[tuple[Plan, list[float]]]:
        """Measure those plans that can meet the budget on some batches; gives none if time ends before the last."""
        able = {plan: recipe for plan in plans if (recipe := self._recipe(plan)) is not None}
        made = []
        for number in numbers:
            if self._late():
                return []
            made.append(self.fitter.measure(number, list(able.values())))
        return [(plan, [value for batch in made for value in batch[i]]) for i, plan in enumerate(able)]

    def _explore(self, scores: dict[Plan, list[float]], plans: Iterable[Plan], limit: float) -> None:
        """Measure plans on the first samples until the limit."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in scores and self._recipe(plan) is not None]
        together = 8 if self.until is None else 2  # fewer, where the clock decides
        for start in range(0, len(new), together):
            if self._over(limit):
                break
            for plan, values in self._measure(self.fitter.search[: self._first], new[start : start + together]):
                scores[plan] = values
                self.tried += 1
            if scores:
                self._show(min(map(_mean, scores.values())))

    def _schedules(self, scores: Mapping[Plan, list[float]]) -> list[Plan]:
        """The better schedules, each once, with whatever scorer it was good."""
        found: dict[tuple[tuple[int, float], ...], Plan] = {}
        smoothed = _smoothed(scores)
        for plan in sorted(scores, key=lambda plan: smoothed[plan]):
            found.setdefault(tuple((stage.place, stage.size) for stage in plan), plan)
        return list(found.values())[:_SCHEDULES]

    def _move(self, plan: Plan) -> Plan:
        """Go from plan to neighbouring plan as long as one is better on all of the search half's samples."""
        batches = self.fitter.search
        rng = np.random.default_rng([self.fitter.seed, 2])
        if self._over(self.limit) or (own := self._by_batch(plan)) is None:
            return plan
        seen = {plan}
        while not self._over(self.limit):
            near = [other for other in _neighbours(plan, 2 * self.fitter.layers) if other not in seen]
            for i in rng.permutation(len(near)):
                other = near[i]
                seen.add(other)
                if self._over(self.limit):
                    return plan
                if (recipe := self._recipe(other)) is None or recipe == self._recipe(plan):
                    continue
                self.tried += 1
                mine: list[float] = []
                theirs: list[float] = []
                for number in batches:
                    if self._late():
                        return plan
                    mine += own[number]
                    theirs += self.fitter.measure(number, [recipe])[0]
                    if _mean(theirs) > _WORSE * _mean(mine):
                        break
                if len(theirs) == sum(map(len, own.values())) and _clearly_less(theirs, mine):
                    plan, own = other, self._by_batch(other) or own
                    self._show(_mean(theirs))
                    break
            else:
                return plan
        return plan

    def _by_batch(self, plan: Plan) -> dict[int, list[float]] | None:
        recipe = self._recipe(plan)
        if recipe is None:
            return None
        return {number: self.fitter.measure(number, [recipe])[0] for number in self.fitter.search}

    def _show(self, best: float | None) -> None:
        self._bar.update(min(self.fitter.passes - self.begun, self._bar.total or 0) - self._bar.n)
        if best is not None:
            self._bar.set_postfix_str(f", best {best:.4f} nats")


def _neighbours(plan: Plan, places: int) -> list[Plan]:
    """Plans that differ in one thing: tokens moved between stages, a stage moved, added, removed, scored otherwise."""
    found: list[Plan] = []

    def changed(number: int, **change: Any) -> Plan:
        return (*plan[:number], dataclasses.replace(plan[number], **change), *plan[number + 1 :])

    for number, stage in enumerate(plan):
        low = plan[number - 1].place if number else -1
        high = plan[number + 1].place if number + 1 < len(plan) else places
        found += [changed(number, place=p) for p in (stage.place - 1, stage.place + 1) if low < p < high]
        if len(plan) > 1:
            found += [changed(number, size=stage.size * factor) for factor in (0.7, 0.85, 1.18, 1.4) if stage.size]
            found.append((*plan[:number], *plan[number + 1 :]))
        if stage.size and number == len(plan) - 1:
            later = range(stage.place + 1, min(stage.place + 5, places))
            more = [dataclasses.replace(stage, place=p, size=stage.size * share) for p in later for share in (0.0, 0.4)]
            found += [(*plan, other) for other in more]
        if len(plan) <= 4:
            found += [
                changed(number, scorer=name, diversity=diversity)
                for name in SCORERS
                for diversity in (*DIVERSITIES, 0.4)
                if (name, diversity) != (stage.scorer, stage.diversity)
            ]
    return found


def _plan(schedule: Sequence[tuple[int, float]], scorer: str, diversity: float) -> Plan:
    """Turn (place, size) pairs into stages with one scorer."""
    return tuple(Stage(place, size, scorer, diversity) for place, size in schedule)


def _rescored(plan: Plan, scorer: str, diversity: float) -> Plan:
    return tuple(dataclasses.replace(stage, scorer=scorer, diversity=diversity) for stage in plan)


def _scaled(plan: Plan, budget: Budget, decoder: DecoderSizes, n: int) -> list[int] | None:
    """The most tokens that each stage may keep, in the plan's proportions; None if not even none at all fits."""

    def counts(scale: float) -> list[int]:
        made, now = [], n
        for stage in plan:
            now = min(now, int(scale * stage.size * n))
            made.append(now)
        return made

    def fits(made: Sequence[int]) -> bool:
        return budget.met_by(_measured(plan, made, budget, decoder, n))

    low, high = 0.0, 1 / min([stage.size for stage in plan if stage.size] or [1.0])
    if not fits(counts(low)):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(counts(middle)) else (low, middle)
    made = counts(low)
    for number in range(len(made)):  # what rounding left over, first stage first
        ceiling = made[number - 1] if number else n
        while (
            (plan[number].size or ceiling == n)  # the first at which tokens leave is never an "all leave" too many
            and made[number] < ceiling
            and fits([*made[:number], made[number] + 1, *made[number + 1 :]])
        ):
            made[number] += 1
    return made


def _measured(plan: Plan, counts: Sequence[int], budget: Budget, decoder: DecoderSizes, n: int) -> float:
    """What a plan reaches, less what its scorers compute ahead of the layers that they stand before."""
    entering, kept = _by_layer(plan, counts, n, decoder.layers)
    reached = budget.measured(decoder, n, kept, entering)
    if budget.kind != "flops_reduction":
        return reached
    befores = zip(plan, [n, *counts[:-1]], counts, strict=True)
    ahead = [before for stage, before, count in befores if stage.place % 2 == 0 and count < before]
    return reached - sum(ahead_macs(decoder, tokens) for tokens in ahead) / visual_macs(
        decoder, n, [0] * decoder.layers
    )


def _by_layer(plan: Plan, counts: Sequence[int], n: int, layers: int) -> tuple[list[int], list[int]]:
    """Tokens that enter each layer, and that it keeps."""
    at = {stage.place: count for stage, count in zip(plan, counts, strict=True)}
    steps = []
    for place in range(2 * layers):
        n = at.get(place, n)
        steps.append(n)
    return steps[::2], steps[1::2]


def _capped(value: float) -> float:
    """A divergence as it is compared: not below 0 by rounding, and at most MOST, which a broken one (NaN) is too."""
    return MOST if value != value else round(min(max(value, 0.0), MOST), 9)


def _require_limits(passes: float | None, minutes: float | None) -> None:
    for name, value in (("passes", passes), ("minutes", minutes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf):
            raise ValueError(f"{name}={value!r}: must be above 0, and finite")


def _whole_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}: must be at least {least}, and an integer")
    return int(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _smoothed(scores: Mapping[Plan, Sequence[float]]) -> dict[Plan, float]:
    """Rank plans by the log of their mean divergence, drawn half-way to what plans with the same parts reach.

    On few samples a plan may be lucky; its places and scorers are shared with others, which were lucky elsewhere. What
    the parts reach is a ridge regression on them.
    """
    plans = list(scores)
    if not plans:
        return {}
    parts = [
        [
            ("first", plan[0].place),
            ("last", plan[-1].place),
            ("stages", len(plan)),
            ("scorer", plan[0].scorer),
            ("diversity", plan[0].diversity),
            ("scorer", plan[0].scorer, plan[0].diversity),
            ("schedule", *((stage.place, stage.size) for stage in plan)),
        ]
        for plan in plans
    ]
    names = {name: i for i, name in enumerate(dict.fromkeys(name for own in parts for name in own))}
    design = np.zeros((len(plans), len(names)))
    for row, own in enumerate(parts):
        design[row, [names[name] for name in own]] = 1
    value = np.log(np.array([_mean(scores[plan]) for plan in plans]) + 1e-6)
    centred = value - value.mean()
    weight = np.linalg.solve(design.T @ design + np.eye(len(names)), design.T @ centred)
    shared = design @ weight
    return {plan: float(own + common) / 2 for plan, own, common in zip(plans, centred, shared, strict=True)}


def _clearly_less(theirs: Sequence[float], mine: Sequence[float]) -> bool:
    """Whether the mean is less by more than the differences' standard error: of many neighbours some are by chance."""
    less = np.subtract(mine, theirs)
    return bool(less.mean() > 0 and less.mean() >= less.std() / math.sqrt(len(less)))


def _digest(recipe: PruningRecipe) -> str:
    """Name what a recipe does."""
    text = json.dumps([list(recipe.entering), list(recipe.keep), recipe.scorer], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _sound(record: Record) -> bool:
    values = record.get("divergence")
    return (
        isinstance(record.get("plan"), str)
        and type(record.get("batch")) is int
        and isinstance(values, list)
        and all(isinstance(value, float) and 0 <= value <= MOST for value in values)
    )
