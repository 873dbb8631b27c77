"""`search`: recipe and scorer chosen together, by what the model says on a calibration set.

Candidates are compared by the divergence of the pruned model's next-token distributions from the dense model's, capped
for each sample. Half of the samples takes no part in the search, and has the last word: unless the winner beats the
paper's rule there too, the paper's recipe is returned.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from tqdm import tqdm

from fitprune.calibration.measure import checked
from fitprune.costs.counts import entering_counts
from fitprune.families.adapter import adapt
from fitprune.fitting.budget import Budget, OutOfReach, budget_from
from fitprune.fitting.fit import Fitter
from fitprune.fitting.stats import AttentionStats
from fitprune.output_search.budget_search import BudgetSearch
from fitprune.output_search.candidates import Candidate, Schedule, first_candidates, recipe_of
from fitprune.output_search.divergence import Judge, reference
from fitprune.output_search.head_weights import HeadChoice, specs
from fitprune.output_search.meter import Meter, run_of
from fitprune.recipes.recipe import PruningRecipe

logger = logging.getLogger(__name__)

PASSES, PASSES_TOGETHER = 36.0, 76.0  # dense prefills of all samples, for one budget and for several
HEAD_SAMPLES = 64  # that heads are weighed on


def search(
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
    """Search for the recipe, and its scorer, that change least what the model says.

    Pass exactly one budget, as for `fit`; a tolerance stands for the FLOPs that `fit` removes at it.

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
        minutes: stop the search this long after the start and take the best so far; None for no limit of time.
        passes: stop after this much computing, in dense prefills of all samples; their answers and heads count too.
        max_new_tokens: longest answer of the dense model that is looked at.
        seed: of the search; the same seed gives the same recipe, unless `minutes` ends it.
        journal: file for what was measured; a search that was killed goes on from it. None keeps nothing.
        progress: show a progress bar with the best divergence.

    Returns:
        The recipe, with its scorer. Its provenance holds the divergence, in nats, of the paper's rule and of what the
        search found, on both halves; `chosen` is "paper" where the search found nothing better on the validation half.

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
    searcher = Searcher(
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
    return searcher.fit([budget], passes=passes, minutes=minutes)[0]


class Searcher:
    """Searches for several budgets with one set of dense answers; what is good for one is tried for the next.

    Args:
        model: a supported `...ForConditionalGeneration` model, without pruning.
        batches: see `search`.
        stats: see `search`.
        validation: see `search`.
        unit: samples whose dense prefills count as one pass; by default all.
        visual_tokens: see `search`.
        max_new_tokens: see `search`.
        seed: see `search`.
        journal: see `search`.
        progress: see `search`.

    Attributes:
        fitter: of the paper's rule.
        meter: measures recipes, and counts the passes.
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
        self._start = time.monotonic()
        max_new_tokens = _whole_number("max_new_tokens", max_new_tokens, 1)
        self.seed, self.progress = _whole_number("seed", seed, 0), progress
        adapted = adapt(model)
        stats.model.require_same(adapted.fingerprint, what="stats")  # before the model answers
        self.fitter = Fitter(stats, visual_tokens=visual_tokens)
        prompts, numbers, self.validation = _halves(batches, validation)
        answered = tqdm(prompts, desc="answer", unit="batch", disable=not progress or None)
        references = [reference(adapted.model, batch, max_new_tokens=max_new_tokens) for batch in answered]
        judge = Judge(adapted.model, references, unit)
        self.meter = Meter(judge, run_of(judge, prompts, self.seed, max_new_tokens), journal)
        self.search = [numbers[i] for i in np.random.default_rng(self.seed).permutation(len(numbers))]
        choice = HeadChoice(self.fitter.visual_tokens)
        for number in numbers:  # as many as are needed to weigh heads, the first ones passed
            choice.add(judge.watch(number))
            self.meter.charge_dense(number)
            if choice.samples >= HEAD_SAMPLES:
                break
        self._scorer_at = functools.cache(functools.partial(specs, choice))

    @property
    def passes(self) -> float:
        """What was computed so far, in dense prefills of `unit` samples."""
        return self.meter.passes

    def fit(
        self, budgets: Sequence[Budget], *, passes: float | None = None, minutes: float | None = None
    ) -> list[PruningRecipe]:
        """Search for a recipe for each budget; see `search`.

        Args:
            budgets: as `fitprune.fitting.budget.checked_budget` makes them.
            passes: for all budgets together; by default 36 for one and 76 for several.
            minutes: for all budgets together, from the first dense answer on.
        """
        _require_limits(passes, minutes)
        papers = [self.fitter.fit(budget) for budget in budgets]  # a budget out of reach is found before the search
        allowance = (PASSES if len(budgets) == 1 else PASSES_TOGETHER) if passes is None else passes
        ends = None if minutes is None else self._start + 60 * minutes
        order = sorted(range(len(budgets)), key=lambda i: papers[i].cost().flops_reduction)
        recipes: dict[int, PruningRecipe] = {}
        known: list[Candidate] = []
        for done, number in enumerate(order):
            left = len(order) - done
            limit = self.passes + max(0.0, allowance - self.passes) / left
            until = None if ends is None else time.monotonic() + max(0.0, ends - time.monotonic()) / left
            recipes[number], good = self._fit(budgets[number], papers[number], limit, until, known)
            known = [*good, *known]
        return [recipes[number] for number in range(len(budgets))]

    def _fit(
        self, budget: Budget, paper: PruningRecipe, limit: float, until: float | None, known: Sequence[Candidate]
    ) -> tuple[PruningRecipe, list[Candidate]]:
        """Search for one budget; also gives the candidates that were good."""
        n, model, stated = self.fitter.visual_tokens, self.fitter.model, budget
        if budget.kind == "tolerance":
            budget = Budget("flops_reduction", paper.cost(visual_tokens=n).flops_reduction)
        search = BudgetSearch(
            self.meter,
            self.search,
            functools.cache(lambda candidate: recipe_of(candidate, budget, model, n, self._scorer_at)),
            places=2 * model.decoder.layers,
            seed=self.seed,
            limit=limit - 2 * self.meter.price(self.validation, paper),  # the rest is for the last word
            until=until,
            title=f"search {budget.kind}={budget.value:g}",
            progress=self.progress,
        )
        winner: PruningRecipe | None = None
        good: list[Candidate] = []
        if removes := min(paper.keep) < 1:
            first = first_candidates(
                known, self._paper_schedules(budget), model.decoder.layers, model.decoder.prunable, self.seed
            )
            winner, good = search.run(first)
        winner = winner or paper
        halves = {"search": self.search, "validation": self.validation}
        divergence = {
            half: {"paper": self.meter.mean(numbers, paper), "found": self.meter.mean(numbers, winner)}
            for half, numbers in halves.items()
        }
        better = divergence["validation"]["found"] < divergence["validation"]["paper"]
        if removes and not better:
            _warn(stated, divergence["validation"], search.tried)
        chosen = winner if better else paper
        entering = entering_counts(n, chosen.counts(n), chosen.counts_before(n))
        provenance = {
            "source": "fitprune.fit_output",  # the name of `search` in all recipes that were saved
            "budget": {stated.kind: stated.value},
            "reached": budget.measured(model.decoder, n, chosen.kept(n), entering),
            "chosen": "found" if better else "paper",
            "divergence": {half: {k: round(v, 6) for k, v in of.items()} for half, of in divergence.items()},
            "samples": {half: self.meter.samples(numbers) for half, numbers in halves.items()},
            "plans": search.tried,
            "seed": self.seed,
            "measured": dict(self.fitter.stats.provenance),
        }
        return dataclasses.replace(chosen, provenance=provenance), good

    def _paper_schedules(self, budget: Budget) -> list[Schedule]:
        """The paper's fit to this budget, and to less and more, as schedules: tokens leave inside layers."""
        schedules = []
        reduction = self.fitter.fit(budget).cost(visual_tokens=self.fitter.visual_tokens).flops_reduction
        for other in (reduction, reduction * 0.8, 1 - (1 - reduction) * 0.7):
            try:
                keep = self.fitter.fit(Budget("flops_reduction", other)).keep
            except OutOfReach:
                continue
            before = (1.0, *keep[:-1])
            schedules.append(tuple((2 * i + 1, k) for i, (k, b) in enumerate(zip(keep, before, strict=True)) if k < b))
        return [schedule for schedule in schedules if schedule]  # one that keeps all is none


def _halves(
    batches: Iterable[Mapping[str, Any]], validation: Iterable[Mapping[str, Any]] | None
) -> tuple[list[Mapping[str, Any]], list[int], list[int]]:
    """All batches, the numbers of those to search on, and of those to validate with: by default every second one."""
    prompts = list(checked(batches))
    numbers = list(range(len(prompts)))
    search, validating = numbers[::2], numbers[1::2]
    if validation is not None:
        prompts += checked(validation)
        search, validating = numbers, list(range(len(numbers), len(prompts)))
    if not search or not validating:
        raise ValueError(
            f"{len(search)} batches to search on and {len(validating)} to validate with: at least one each is needed; "
            "use more samples or a smaller batch size"
        )
    return prompts, search, validating


def _warn(budget: Budget, validation: Mapping[str, float], tried: int) -> None:
    """Say why the paper's recipe is returned."""
    reason = "the search ended before the first candidate was measured (allow more minutes or passes)"
    if tried:
        figures = f"{validation['found']:.4f} against {validation['paper']:.4f} nats"
        reason = f"on the validation half nothing found is better than the paper's rule ({figures})"
    logger.warning("%s=%g: %s; the paper's recipe is returned", budget.kind, budget.value, reason)


def _require_limits(passes: float | None, minutes: float | None) -> None:
    for name, value in (("passes", passes), ("minutes", minutes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf):
            raise ValueError(f"{name}={value!r}: must be above 0, and finite")


def _whole_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}: must be at least {least}, and an integer")
    return int(value)
