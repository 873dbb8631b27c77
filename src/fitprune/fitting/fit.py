"""`fit`: from saved statistics and a budget to a recipe. No model, no GPU; one measurement serves every budget.

The fit searches one number, the tolerance: the share of received attention that each layer may lose. For a tolerance,
`walk.Simulation` walks through the layers of every sample and counts what could leave; the search finds the least
tolerance that meets the budget; what the last step overshoots is given back token by token. Where few layers may
remove, the fit is then merged to them (`few_layers`) at equal budget.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

from fitprune._support import checked
from fitprune._support.messages import short
from fitprune.costs.counts import Counts
from fitprune.costs.latency import LatencyProfile
from fitprune.costs.sizes import MOST_TOKENS
from fitprune.fitting import few_layers
from fitprune.fitting.budget import Budget, budget_from, require_possible
from fitprune.fitting.leftover import between, give_back
from fitprune.fitting.stats import AttentionStats
from fitprune.fitting.walk import Simulation
from fitprune.recipes import rounding
from fitprune.recipes.recipe import PruningRecipe

TOLERANCE_STEP = 1e-3  # the search ends when feasible and infeasible tolerance are this close
MOST_LOST = 500_000_000  # entries of `few_layers.lost_attention`, 12 bytes each while it is computed


@overload
def fit(
    stats: AttentionStats,
    *,
    flops_reduction: float | None = None,
    kv_cache_reduction: float | None = None,
    mean_visual_tokens: float | None = None,
    tolerance: float | None = None,
    prefill_latency_reduction: float | None = None,
    profile: LatencyProfile | None = None,
    visual_tokens: int | None = None,
    max_removal_layers: int | None = None,
) -> PruningRecipe: ...
@overload
def fit(
    stats: AttentionStats,
    *,
    flops_reduction: Sequence[float] | None = None,
    kv_cache_reduction: Sequence[float] | None = None,
    mean_visual_tokens: Sequence[float] | None = None,
    tolerance: Sequence[float] | None = None,
    prefill_latency_reduction: Sequence[float] | None = None,
    profile: LatencyProfile | None = None,
    visual_tokens: int | None = None,
    max_removal_layers: int | None = None,
) -> list[PruningRecipe]: ...
def fit(
    stats: AttentionStats,
    *,
    flops_reduction: float | Sequence[float] | None = None,
    kv_cache_reduction: float | Sequence[float] | None = None,
    mean_visual_tokens: float | Sequence[float] | None = None,
    tolerance: float | Sequence[float] | None = None,
    prefill_latency_reduction: float | Sequence[float] | None = None,
    profile: LatencyProfile | None = None,
    visual_tokens: int | None = None,
    max_removal_layers: int | None = None,
) -> Any:
    """Fit the recipe that meets a budget at the least loss of attention.

    Pass exactly one budget: a number, or a list of numbers for a recipe each. It is met for images of `visual_tokens`,
    and missed by less than one token in one layer; with `max_removal_layers`, in one run of layers that keep the same
    number. Budgets of a list share the tolerances tried, so a recipe may differ by a token from one fitted alone.

    Args:
        stats: from `measure`.
        flops_reduction: fraction of the visual tokens' FLOPs to remove, the paper's budget.
        kv_cache_reduction: fraction of the visual tokens' KV-cache bytes to remove.
        mean_visual_tokens: visual tokens that may enter a layer, mean over layers.
        tolerance: no budget but the share of attention that each layer may lose, 0 to 1.
        prefill_latency_reduction: fraction of the whole prefill's seconds to save, vision tower and scoring counted, on
            the device and for the prompt of `profile`.
        profile: from `profile_latency`; for a latency alone.
        visual_tokens: image size that the budget is met for; by default the statistics' most common count.
        max_removal_layers: the most layers that tokens may leave, since each costs time; by default all, and for a
            latency a quarter, but at least 4. A fit that has more is merged at equal budget
            (`few_layers.merge_layers`); one within a tolerance, at equal visual FLOPs.

    Returns:
        The recipe, or for a list of values a list of recipes. Its provenance holds budget, tolerance, what was reached,
        and the number of samples; with `max_removal_layers`, also that and the `extra_loss` of attention that merging
        takes, before rounding.

    Raises:
        ValueError: no budget or several, a value out of range, a budget that no removal can meet (the message says
            what can), or statistics without samples.

    Source: arXiv:2409.10197. Differs from the authors' code: attention is not renormalised among the tokens that are
    left (one measurement serves every budget; `fit_sequential` is their procedure), the last feasible tolerance is kept
    instead of the last tried, and the tolerance is searched to 0.001 instead of 0.01.
    """
    return Fitter(stats, visual_tokens=visual_tokens).fit(
        max_removal_layers=max_removal_layers,
        flops_reduction=flops_reduction,
        kv_cache_reduction=kv_cache_reduction,
        mean_visual_tokens=mean_visual_tokens,
        tolerance=tolerance,
        prefill_latency_reduction=prefill_latency_reduction,
        profile=profile,
    )


class Fitter:
    """Fits any number of budgets from one set of statistics, sorting once and sharing every tolerance tried.

    `Fitter(stats).fit(flops_reduction=0.6)` takes the budgets of `fit`, in any number of calls.

    Args:
        stats: from `measure`.
        visual_tokens: as for `fit`.
    """

    def __init__(self, stats: AttentionStats, *, visual_tokens: int | None = None) -> None:
        if not isinstance(stats, AttentionStats):
            raise ValueError(f"stats is a {type(stats).__name__}: must be AttentionStats, as of AttentionStats.load")
        if len(stats) == 0:
            raise ValueError("stats holds no sample: measure at least one")
        if visual_tokens is not None:
            checked.whole("visual_tokens", visual_tokens, 1, MOST_TOKENS)
        self.stats = stats
        self.model = stats.model
        self.visual_tokens = visual_tokens or stats.usual_visual_tokens
        self._simulation = Simulation(stats)
        self._drawn: torch.Tensor | None = None  # all samples, each once
        self._tried: dict[float, list[float]] = {}
        self._lost: torch.Tensor | None = None

    def resampled(self, samples: Sequence[int]) -> Fitter:
        """Make a fitter of a draw of the samples.

        Walks of all samples are shared by all fitters; a draw of fewer than half walks its own samples alone. So a
        thousand draws cost little more than one fit.

        Args:
            samples: indices, each as often as drawn.

        Raises:
            ValueError: `samples` is empty.
        """
        if not samples:
            raise ValueError("samples is empty: draw at least one")
        other = copy.copy(self)
        other._drawn, other._tried, other._lost = torch.tensor(samples), {}, None
        return other

    @overload
    def fit(self, budget: Budget, max_removal_layers: int | None = None) -> PruningRecipe: ...
    @overload
    def fit(self, budget: None = None, max_removal_layers: int | None = None, **budgets: Any) -> Any: ...
    def fit(self, budget: Budget | None = None, max_removal_layers: int | None = None, **budgets: Any) -> Any:
        """Fit one budget, or a list of them.

        Args:
            budget: of `budget_from`; None where it is passed by keyword.
            max_removal_layers: as for `fit`.
            **budgets: the budget and `profile`, as for `fit`.

        Returns:
            The recipe, or for a list of values a list of recipes.
        """
        wanted = budget_from(**budgets) if budget is None else budget
        if budget is not None and (budgets or not isinstance(budget, Budget)):
            raise ValueError(f"budget={short(budget)}: must be a Budget alone, or pass flops_reduction=0.6 or the like")
        if max_removal_layers is not None and (type(max_removal_layers) is not int or max_removal_layers < 1):
            raise ValueError(
                f"max_removal_layers={short(max_removal_layers)}: must be an integer of at least 1; leave it out to "
                "remove at every layer"
            )
        if isinstance(wanted, list):
            return [self._fit(one, max_removal_layers) for one in wanted]
        return self._fit(wanted, max_removal_layers)

    def _fit(self, budget: Budget, max_removal_layers: int | None) -> PruningRecipe:
        if budget.profile is not None:
            self.model.require_same(budget.profile.model, what="the statistics, by the latency profile,")
            max_removal_layers = max_removal_layers or max(4, -(-self.model.decoder.layers // 4))
        tolerance, kept = self._fitted(budget)
        provenance: dict[str, Any] = {
            "source": "fitprune.fit",
            "budget": {budget.kind: budget.value},
            "tolerance": tolerance,
            "samples": len(self.stats if self._drawn is None else self._drawn),
            "measured": dict(self.stats.provenance),
        }
        if (on := budget.profile) is not None:
            provenance["profile"] = {name: getattr(on, name) for name in ("device", "dtype", "batch", "text_tokens")}
        if max_removal_layers is not None:
            kept, extra = self._merged(budget, kept, max_removal_layers)
            provenance |= {"max_removal_layers": max_removal_layers, "extra_loss": extra}
        if budget.kind != "tolerance":
            provenance["reached"] = budget.measured(self.model.decoder, self.visual_tokens, kept)
        counts = Counts(self.visual_tokens, tuple(kept))
        return PruningRecipe.from_counts(counts, self.model, provenance=provenance)

    def _fitted(self, budget: Budget) -> tuple[float, list[int]]:
        """Find the tolerance, and the tokens left after each layer."""
        decoder, n = self.model.decoder, self.visual_tokens
        if budget.kind == "tolerance":
            return budget.value, self._whole(budget.value)
        require_possible(budget, decoder, n)

        def measured(at: float) -> float:
            return budget.measured(decoder, n, [fraction * n for fraction in self.kept_fractions(at)])

        def meets(at: float) -> bool:
            return budget.met_by(budget.measured(decoder, n, self._whole(at)))

        feasible = infeasible = 0.0
        if not meets(0.0):
            known = sorted({0.0, 1.0, *self._simulation.walks, *self._tried})  # what was tried narrows the search
            first = bisect.bisect_left(known, True, key=meets)
            infeasible, feasible = known[first - 1], known[first]
            while feasible - infeasible > TOLERANCE_STEP:
                middle = _next_tolerance(infeasible, feasible, measured, budget.value)
                if meets(middle):
                    feasible = middle
                else:
                    infeasible = middle
        kept = between(budget, decoder, n, self._whole(feasible), self._whole(infeasible))
        return feasible, give_back(budget, decoder, n, kept)

    def _merged(self, budget: Budget, kept: list[int], at_most: int) -> tuple[list[int], float]:
        """Merge the removals to at most n layers at equal budget; give the extra loss that it takes too."""
        decoder, n = self.model.decoder, self.visual_tokens
        if len(Counts(n, tuple(kept)).removing) <= at_most:
            return kept, 0.0
        if budget.kind == "tolerance":  # at equal visual FLOPs
            budget = Budget("flops_reduction", 0.0)
            budget = dataclasses.replace(budget, value=budget.measured(decoder, n, kept))
        if (entries := len(decoder.prunable) * decoder.layers * n) > MOST_LOST:
            raise ValueError(
                f"max_removal_layers={at_most}: needs {12e-9 * entries:.0f} GB for images of {n:,} visual tokens; "
                "leave it out, or fit for smaller images"
            )
        if self._lost is None:
            drawn = self.stats if self._drawn is None else self.stats.select(self._drawn.tolist())
            self._lost = few_layers.lost_attention(drawn, n)
        prices = few_layers.prices_of(budget, decoder, n)
        merged, extra = few_layers.merge_layers(kept, self._lost, prices, decoder.prunable, at_most)
        return give_back(budget, decoder, n, merged, Counts(n, tuple(merged)).removing), extra

    def kept_fractions(self, tolerance: float) -> list[float]:
        """Give the fraction of visual tokens left after each layer at a tolerance, mean over samples."""
        if tolerance not in self._tried:
            walks, drawn = self._simulation.walks, self._drawn
            if drawn is None:
                kept = self.kept_by_sample(tolerance)
            elif tolerance in walks or 2 * len(drawn) >= len(self.stats):
                kept = self.kept_by_sample(tolerance)[drawn]
            else:
                kept = self._simulation.walk(tolerance, drawn)
            self._tried[tolerance] = kept.mean(0).tolist()
        return self._tried[tolerance]

    def kept_by_sample(self, tolerance: float) -> torch.Tensor:
        """Give the [samples, layers] fp64 fractions left after each layer, of all samples."""
        return self._simulation.kept_by_sample(tolerance)

    def _whole(self, tolerance: float) -> list[int]:
        return rounding.rounded_counts(self.kept_fractions(tolerance), self.visual_tokens)


def _next_tolerance(low: float, high: float, measured: Callable[[float], float], target: float) -> float:
    """Choose the tolerance to try between an infeasible and a feasible one.

    The interpolated root, moved a little towards the farther end: when it is close, two such trials enclose it within
    a step, where plain interpolation would creep up from one side.
    """
    at_low, at_high = measured(low), measured(high)
    share = 0.5 if at_high == at_low else (target - at_low) / (at_high - at_low)
    root = low + (high - low) * min(max(share, 0.02), 0.98)
    nudge = 0.4 * TOLERANCE_STEP
    tried = root - nudge if root - low > high - root else root + nudge
    return min(max(tried, low + nudge), high - nudge)
