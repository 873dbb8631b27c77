"""`fit`: from saved statistics and a budget to a recipe. No model, no GPU; one measurement serves every budget.

The fit searches one number, the tolerance: the share of received attention that each layer may lose. For a tolerance,
`_Simulation` walks through the layers of every sample and counts what could leave; the search finds the least tolerance
that meets the budget; what the last step overshoots is given back token by token. Where few layers may remove, the fit
is then merged (`merging`) at equal budget.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fitprune.costs.latency import LatencyProfile
from fitprune.costs.sizes import DecoderSizes
from fitprune.fitting import few_layers
from fitprune.fitting.budget import Budget, one_budget, require_possible
from fitprune.fitting.stats import AttentionStats
from fitprune.recipes import rounding
from fitprune.recipes.recipe import PruningRecipe

TOLERANCE_STEP = 1e-3  # the search ends when feasible and infeasible tolerance are this close
MOST_LOST = 500_000_000  # entries of `few_layers.lost_attention`, 12 bytes each while it is made
_CHUNK = 32  # samples simulated at a time: their working set stays in the processor's cache


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
) -> PruningRecipe:
    """Fit the recipe that meets a budget at the least loss of attention.

    State exactly one budget. It is met for images of `visual_tokens`, and missed by less than one token in one layer;
    with `max_removal_layers`, in one run of layers that keep as many.

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
        The recipe; its provenance holds budget, tolerance, what was reached, and the number of samples; if asked for,
        `max_removal_layers` and the `extra_loss` of attention that merging to them takes, before rounding.

    Raises:
        ValueError: no budget or several, a value out of range, a budget that no removal can meet (the message says
            what can), or statistics without samples.

    Source: arXiv:2409.10197. Differs from the authors' code: attention is not renormalised among the tokens that are
    left (one measurement serves every budget; `fit_sequential` is their procedure), the last feasible tolerance is kept
    instead of the last tried, and the tolerance is searched to 0.001 instead of 0.01.
    """
    budget = one_budget(
        flops_reduction=flops_reduction,
        kv_cache_reduction=kv_cache_reduction,
        mean_visual_tokens=mean_visual_tokens,
        tolerance=tolerance,
        prefill_latency_reduction=prefill_latency_reduction,
        profile=profile,
    )
    return Fitter(stats, visual_tokens=visual_tokens).fit(budget, max_removal_layers)


class Fitter:
    """Fits several budgets from one set of statistics, sorting once and sharing every tolerance tried."""

    def __init__(self, stats: AttentionStats, *, visual_tokens: int | None = None) -> None:
        if not isinstance(stats, AttentionStats):
            raise ValueError(f"stats is a {type(stats).__name__}: must be AttentionStats, as of AttentionStats.load")
        if len(stats) == 0:
            raise ValueError("stats holds no sample: measure at least one")
        if visual_tokens is not None:
            rounding.require_tokens("visual_tokens", visual_tokens, 1)
        self.stats = stats
        self.model = stats.model
        self.visual_tokens = visual_tokens or stats.usual_visual_tokens
        self._simulation = _Simulation(stats)
        self._drawn: torch.Tensor | None = None  # all samples, each once
        self._tried: dict[float, list[float]] = {}
        self._lost: torch.Tensor | None = None

    def resampled(self, samples: Sequence[int]) -> Fitter:
        """Make a fitter of a draw of the samples, by index and as often as drawn.

        Walks of all samples are shared by all fitters; a draw of fewer than half walks its own samples alone. So a
        thousand draws cost little more than one fit.

        Raises:
            ValueError: `samples` is empty.
        """
        if not samples:
            raise ValueError("samples is empty: draw at least one")
        other = copy.copy(self)
        other._drawn, other._tried, other._lost = torch.tensor(samples), {}, None
        return other

    def fit(self, budget: Budget, max_removal_layers: int | None = None) -> PruningRecipe:
        """Fit one budget; see `fit`."""
        if max_removal_layers is not None and (type(max_removal_layers) is not int or max_removal_layers < 1):
            raise ValueError(
                f"max_removal_layers={max_removal_layers!r}: must be an integer of at least 1; leave it out to remove "
                "at every layer"
            )
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
        keep = tuple(count / self.visual_tokens for count in kept)
        return PruningRecipe(keep, self.model, self.visual_tokens, provenance)

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
        kept = _between(budget, decoder, n, self._whole(feasible), self._whole(infeasible))
        return feasible, give_back(budget, decoder, n, kept)

    def _merged(self, budget: Budget, kept: list[int], at_most: int) -> tuple[list[int], float]:
        """Merge the removals to so many layers at equal budget, with the extra loss that it takes."""
        decoder, n = self.model.decoder, self.visual_tokens
        if len(_removing(kept, n)) <= at_most:
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
        merged, extra = few_layers.merge_layers(kept, self._lost, budget.prices(decoder, n), decoder.prunable, at_most)
        return give_back(budget, decoder, n, merged, _removing(merged, n)), extra

    def kept_fractions(self, tolerance: float) -> list[float]:
        """Mean over samples of the fraction of visual tokens left after each layer, at a tolerance."""
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
        """[samples, layers] fp64, fraction of each sample's visual tokens left after each layer; of all samples."""
        return self._simulation.kept_by_sample(tolerance)

    def _whole(self, tolerance: float) -> list[int]:
        return rounding.rounded_counts(self.kept_fractions(tolerance), self.visual_tokens)


class _Simulation:
    """Walks all samples through the layers at a tolerance, on the attention that was measured dense."""

    def __init__(self, stats: AttentionStats) -> None:
        layers, samples, longest = stats.model.decoder.layers, len(stats), max(stats.visual_tokens)
        self.prunable = stats.model.decoder.prunable
        self.counts = torch.tensor(stats.visual_tokens)
        self.present = torch.arange(longest) < self.counts[:, None]  # [S, n]
        sides = []
        for attention in (stats.self_attention, stats.cross_attention):
            padded = torch.full((layers, samples, longest), float("inf"))
            padded.masked_scatter_(self.present.expand(layers, -1, -1), attention.float())
            value, order = padded.sort(dim=2, stable=True)
            value.masked_fill_(value.isinf(), 0)
            sides.append((value, order, value.sum(2)))
        self.sides = sides
        self.walks: dict[float, torch.Tensor] = {}

    def kept_by_sample(self, tolerance: float) -> torch.Tensor:
        """[samples, layers] fp64, the fraction left after each layer. Each tolerance is walked once."""
        if tolerance not in self.walks:
            starts = range(0, len(self.counts), _CHUNK)
            self.walks[tolerance] = torch.cat([self._chunk(slice(s, s + _CHUNK), tolerance) for s in starts])
        return self.walks[tolerance]

    def walk(self, tolerance: float, samples: torch.Tensor) -> torch.Tensor:
        """The same for some samples, by index, and not remembered."""
        return torch.cat([self._chunk(rows, tolerance) for rows in torch.split(samples, _CHUNK)])

    def _chunk(self, rows: slice | torch.Tensor, tolerance: float) -> torch.Tensor:
        """[chunk's samples, layers], the fraction left after each layer; the rule is `lowest_in_both`'s.

        Orders are sorted once for all tolerances, so a layer costs gathers and running sums only.
        """
        present = self.present[rows].clone()
        original = self.counts[rows].double()
        fractions: list[torch.Tensor] = []
        for layer in range(len(self.sides[0][0])):
            if layer not in self.prunable:
                fractions.append(fractions[-1] if fractions else torch.ones_like(original))
                continue
            leaving = present
            for values, orders, totals in self.sides:
                value, order = values[layer, rows], orders[layer, rows]
                here = value * present.gather(1, order)
                running = here.cumsum(1)
                slack = running[:, -1] - (1 - tolerance) * totals[layer, rows]
                removable = running <= slack[:, None]
                leaving = leaving & torch.empty_like(removable).scatter_(1, order, removable)
            present &= ~leaving
            fractions.append(present.sum(1) / original)
        return torch.stack(fractions, 1)


def _between(
    budget: Budget, decoder: DecoderSizes, visual_tokens: int, feasible: list[int], infeasible: list[int]
) -> list[int]:
    """Move all layers together from the feasible counts towards the infeasible ones, as far as the budget allows."""
    low, high, best = 0.0, 1.0, feasible
    for _ in range(12):
        share = (low + high) / 2
        mixed = [math.floor(a + share * (b - a) + 0.5) for a, b in zip(feasible, infeasible, strict=True)]
        if budget.met_by(budget.measured(decoder, visual_tokens, mixed)):
            low, best = share, mixed
        else:
            high = share
    return best


def give_back(
    budget: Budget,
    decoder: DecoderSizes,
    visual_tokens: int,
    kept: Sequence[int],
    starts: Sequence[int] | None = None,
) -> list[int]:
    """Raise kept counts, first layer first, as long as the budget is still met.

    Afterwards no layer that tokens may leave can keep one more without missing the budget. Where only some layers,
    `starts`, may remove, those up to the next of them are raised together.
    """
    kept = list(kept)
    starts = decoder.prunable if starts is None else starts
    # What a layer keeps, those up to the next that tokens may leave keep too.
    spans = list(zip(starts, [*starts[1:], decoder.layers], strict=True))

    def raised(span: tuple[int, int], more: int) -> list[int]:
        first, end = span
        return [*kept[:first], *(count + more for count in kept[first:end]), *kept[end:]]

    def fits(span: tuple[int, int], more: int) -> bool:
        ceiling = kept[span[0] - 1] if span[0] else visual_tokens
        tried = raised(span, more)
        return tried[span[0]] <= ceiling and budget.met_by(budget.measured(decoder, visual_tokens, tried))

    changed = True
    while changed:
        changed = False
        for span in spans:
            step = 0
            while fits(span, step + 1):  # tokens given back at one layer are few: the tolerance is fine already
                step += 1
            kept = raised(span, step)
            changed |= step > 0
    return kept


def _removing(kept: Sequence[int], visual_tokens: int) -> list[int]:
    """List the layers that tokens leave."""
    before = [visual_tokens, *kept[:-1]]
    return [layer for layer, (had, keeps) in enumerate(zip(before, kept, strict=True)) if keeps < had]


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
