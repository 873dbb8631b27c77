"""How firmly statistics fix a recipe: what a tolerance removes, what a recipe loses, and what other samples would give.

Shapes: L layers, B samples of a block, N visual tokens of a sample, R recipes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from fitprune.analysis.spread import Row, Spread, blocks, shares_of, spread_of
from fitprune.fitting.budget import Budget
from fitprune.fitting.fit import Fitter
from fitprune.fitting.stats import AttentionStats
from fitprune.recipes.recipe import PruningRecipe

TOLERANCES = tuple(step / 40 for step in range(41))
SIZES = (8, 16, 64, 655)  # the paper calibrates with 655 samples
RESAMPLES = 30


@dataclasses.dataclass(frozen=True, eq=False)
class ToleranceCurve:
    """What each tolerance removes.

    Attributes:
        tolerances: share of received attention that a layer may lose.
        flops_reduction: [tolerances], of the mean fractions kept, as the fit sees it.
        kv_cache_reduction: [tolerances], likewise.
        by_sample: FLOPs reduction that the tolerance would give each sample on its own, [tolerances], over samples.
    """

    tolerances: tuple[float, ...]
    flops_reduction: torch.Tensor
    kv_cache_reduction: torch.Tensor
    by_sample: Spread

    COLUMNS: ClassVar = (
        "tolerance", "flops_reduction", "kv_cache_reduction", *(f"by_sample_{name}" for name in Spread.COLUMNS)
    )  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        for at, tolerance in enumerate(self.tolerances):
            yield tolerance, self.flops_reduction[at], self.kv_cache_reduction[at], *self.by_sample.cells(at)


@dataclasses.dataclass(frozen=True, eq=False)
class FittedBudget:
    """The recipe of one budget, fitted from all samples.

    Attributes:
        flops_reduction: the budget.
        recipe: what was fitted.
        lost_self: [L], share of the layer's received self attention that is lost, mean over samples.
        lost_cross: [L], the same for cross attention.
        attention_loss: mean of both over layers.
    """

    flops_reduction: float
    recipe: PruningRecipe
    lost_self: torch.Tensor
    lost_cross: torch.Tensor
    attention_loss: float

    COLUMNS: ClassVar = ("flops_reduction", "layer", "removed", "kept", "lost_self", "lost_cross")

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        counts, kept = (each(self.recipe.visual_tokens) for each in (self.recipe.counts, self.recipe.kept))
        for layer, columns in enumerate(zip(counts, kept, self.lost_self, self.lost_cross, strict=True)):
            yield self.flops_reduction, layer, *columns


@dataclasses.dataclass(frozen=True, eq=False)
class SizeStability:
    """Recipes of one budget, fitted from n samples drawn with replacement.

    Attributes:
        flops_reduction: the budget.
        samples: samples of each draw.
        removed: tokens removed at each layer, [L], over draws.
        kept: tokens present after each layer, [L], over draws.
        tolerance: that the fit ended at, [], over draws.
        distance: tokens per layer between a draw's recipe and that of all samples (`recipe_distance`), [], over draws.
        attention_loss: of a draw's recipe on all samples, [], over draws.
    """

    flops_reduction: float
    samples: int
    removed: Spread
    kept: Spread
    tolerance: Spread
    distance: Spread
    attention_loss: Spread

    COLUMNS: ClassVar = ("flops_reduction", "samples", "quantity", *Spread.COLUMNS)
    LAYER_COLUMNS: ClassVar = ("flops_reduction", "samples", "quantity", "layer", *Spread.COLUMNS)

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        for name in ("tolerance", "distance", "attention_loss"):
            yield self.flops_reduction, self.samples, name, *getattr(self, name).cells(())

    def layer_rows(self) -> Iterator[Row]:
        """Give the rows of a table of LAYER_COLUMNS."""
        for name in ("removed", "kept"):
            for layer in range(len(self.kept.mean)):
                yield self.flops_reduction, self.samples, name, layer, *getattr(self, name).cells(layer)


@dataclasses.dataclass(frozen=True, eq=False)
class DataStability:
    """Recipes of one budget, each fitted from its own data; K sets of data.

    Attributes:
        flops_reduction: the budget.
        names: of the data, [K].
        kept: [K, L], tokens present after each layer.
        distance: [K, K], tokens per layer between two recipes.
        attention_loss: [K, K], of the row's recipe on the column's data.
    """

    flops_reduction: float
    names: tuple[str, ...]
    kept: torch.Tensor
    distance: torch.Tensor
    attention_loss: torch.Tensor

    COLUMNS: ClassVar = ("flops_reduction", "fitted_on", "other", "distance", "attention_loss_on_other")

    def rows(self) -> Iterator[Row]:
        """Give the rows of a table of COLUMNS."""
        for row, one in enumerate(self.names):
            for column, other in enumerate(self.names):
                yield self.flops_reduction, one, other, self.distance[row, column], self.attention_loss[row, column]


def tolerance_curve(fitter: Fitter, tolerances: Sequence[float] = TOLERANCES) -> ToleranceCurve:
    """Walk all samples at each tolerance, and price what is kept."""
    decoder, n, counts = fitter.stats.model.decoder, fitter.visual_tokens, fitter.stats.visual_tokens
    flops, kv = Budget("flops_reduction", 0), Budget("kv_cache_reduction", 0)
    together: list[tuple[float, float]] = []
    alone = torch.empty(len(counts), len(tolerances), dtype=torch.float64)
    for column, tolerance in enumerate(tolerances):
        mean = [fraction * n for fraction in fitter.kept_fractions(tolerance)]
        together.append((flops.measured(decoder, n, mean), kv.measured(decoder, n, mean)))
        for row, (own, kept) in enumerate(zip(counts, fitter.kept_by_sample(tolerance).tolist(), strict=True)):
            alone[row, column] = flops.measured(decoder, own, [fraction * own for fraction in kept])
    reductions = torch.tensor(together, dtype=torch.float64)
    return ToleranceCurve(tuple(tolerances), reductions[:, 0], reductions[:, 1], spread_of(alone))


def fit_budgets(fitter: Fitter, budgets: Sequence[Budget]) -> tuple[FittedBudget, ...]:
    """Fit each budget from all samples, and find what its recipe loses."""
    recipes = [fitter.fit(budget) for budget in budgets]
    losses = attention_loss(fitter.stats, recipes)
    return tuple(
        FittedBudget(budget.value, recipe, lost[0], lost[1], float(lost.mean()))
        for budget, recipe, lost in zip(budgets, recipes, losses, strict=True)
    )


def attention_loss(stats: AttentionStats, recipes: Sequence[PruningRecipe]) -> torch.Tensor:
    """Find the share of each layer's received attention that recipes lose, by the rule of inference.

    At each layer the tokens with the lowest score (self x cross) among those present leave, as many as the recipe
    says for the sample's size; of equal scores the later token stays, as in `fitting.rules.keep_highest`. What the
    layer's dense attention gave to tokens that are gone by its end is lost, as the fit counts it.

    Args:
        stats: from `measure`.
        recipes: of the same model.

    Returns:
        [R, 2, L] fp64, self and cross, mean over samples.
    """
    layers = stats.model.decoder.layers
    unique = {recipe.keep: recipe for recipe in recipes}
    kept_share = {keep: torch.zeros(2, layers, dtype=torch.float64) for keep in unique}
    for samples, received in blocks(stats):
        count = received.shape[-1]
        order = (received[0] * received[1]).argsort(dim=2, stable=True)
        shares = shares_of(received).transpose(0, 1).float().contiguous()  # [L, 2, B, N]; half the traffic
        whole = torch.full((2,), float(len(samples)))
        for keep, recipe in unique.items():
            present = torch.ones(len(samples), count)
            before, left = count, []
            for layer, kept in enumerate(recipe.kept(count)):
                if kept < before:
                    here = present.gather(1, order[layer])
                    here *= here.cumsum(1) > before - kept
                    present.scatter_(1, order[layer], here)
                    before = kept
                left.append((shares[layer] * present).sum((1, 2)) if before < count else whole)
            kept_share[keep] += torch.stack(left, 1)
    return 1 - torch.stack([kept_share[recipe.keep] for recipe in recipes]) / len(stats)


def recipe_distance(kept: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean over layers of the difference in tokens present after the layer, [..., L] each."""
    return (kept.double() - other.double()).abs().mean(-1)


def stability_over_size(
    fitter: Fitter,
    budgets: Sequence[Budget],
    *,
    sizes: Sequence[int] = SIZES,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[SizeStability, ...]:
    """Fit recipes from samples drawn with replacement, for several calibration sizes.

    Sizes that the statistics do not reach are left out, and all samples are always one of the sizes. All budgets see
    the same draws.

    Args:
        fitter: of all samples.
        budgets: to fit.
        sizes: samples of a draw.
        resamples: draws for each size.
        seed: of the draws.
    """
    available, n = len(fitter.stats), fitter.visual_tokens
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Budget, int]] = []
    recipes: list[PruningRecipe] = []
    for size in sorted({size for size in sizes if size < available} | {available}):
        draws = torch.randint(available, (resamples, size), generator=generator).tolist()
        fitters = [fitter.resampled(draw) for draw in draws]
        for budget in budgets:
            cases.append((budget, size))
            recipes += [each.fit(budget) for each in fitters]
    whole = {budget: torch.tensor(fitter.fit(budget).kept(n)) for budget in budgets}
    losses = attention_loss(fitter.stats, recipes).mean((1, 2))
    parts = []
    for number, (budget, size) in enumerate(cases):
        rows = slice(number * resamples, (number + 1) * resamples)
        kept = torch.tensor([recipe.kept(n) for recipe in recipes[rows]])
        parts.append(
            SizeStability(
                flops_reduction=budget.value,
                samples=size,
                removed=spread_of(torch.tensor([recipe.counts(n) for recipe in recipes[rows]])),
                kept=spread_of(kept),
                tolerance=spread_of(torch.tensor([recipe.provenance["tolerance"] for recipe in recipes[rows]])),
                distance=spread_of(recipe_distance(kept, whole[budget])),
                attention_loss=spread_of(losses[rows]),
            )
        )
    return tuple(sorted(parts, key=lambda part: (budgets.index(_budget(part)), part.samples)))


def stability_over_data(
    sources: Mapping[str, AttentionStats], budgets: Sequence[Budget], *, visual_tokens: int
) -> tuple[DataStability, ...]:
    """Fit each budget on each data, and try each recipe on all of them.

    Args:
        sources: statistics of one model, by name.
        budgets: to fit.
        visual_tokens: image size that recipes are fitted and compared for.
    """
    fitters = [Fitter(stats, visual_tokens=visual_tokens) for stats in sources.values()]
    recipes = [[fitter.fit(budget) for fitter in fitters] for budget in budgets]
    every = [recipe for row in recipes for recipe in row]
    # [budgets, fitted on, tried on]
    losses = torch.stack([attention_loss(stats, every).mean((1, 2)) for stats in sources.values()], 1)
    parts = []
    for number, budget in enumerate(budgets):
        kept = torch.tensor([recipe.kept(visual_tokens) for recipe in recipes[number]])
        loss = losses[number * len(fitters) :][: len(fitters)]
        distance = recipe_distance(kept[:, None], kept[None])
        parts.append(DataStability(budget.value, tuple(sources), kept, distance, loss))
    return tuple(parts)


def halves(stats: AttentionStats, *, seed: int = 0) -> dict[str, AttentionStats]:
    """Split the samples into two random halves; of an odd number the second is larger.

    Args:
        stats: of two samples or more.
        seed: of the split.

    Raises:
        ValueError: there is only one sample.
    """
    if len(stats) < 2:
        raise ValueError(f"stats holds {len(stats)} sample: must be at least 2 to split")
    order = torch.randperm(len(stats), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = len(order) // 2
    return {"half 1": stats.select(sorted(order[:middle])), "half 2": stats.select(sorted(order[middle:]))}


def _budget(part: SizeStability) -> Budget:
    return Budget("flops_reduction", part.flops_reduction)
