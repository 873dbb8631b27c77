"""`analyze`: what attention statistics look like, and how much of a recipe they pin down. Knows no model.

Each part is a function of its own on `AttentionStats`; `analyze` runs them all. Samples are taken a few at a time,
those of one visual-token count together, so the working set stays small and nothing is padded.
Shapes: L layers, S samples, N visual tokens of a sample, B samples of a block, R recipes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from fitprune.fitting.budget import Budget, checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.fitting.stats import AttentionStats
from fitprune.recipes.recipe import PruningRecipe

BUDGETS = (0.4, 0.6, 0.8)  # FLOPs reductions
TOP_FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
TOLERANCES = tuple(step / 40 for step in range(41))
SIZES = (8, 16, 64, 655)  # the paper calibrates with 655 samples
RESAMPLES = 30
INTERVAL = (0.05, 0.95)  # quantiles that a spread gives
KINDS = ("self", "cross", "score")  # score: self x cross, by which inference ranks tokens
_BLOCK = 16  # samples worked on at a time: so few that torch does not split an operation over threads, which costs more


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Mean, standard deviation, and INTERVAL's quantiles, over samples or over resamples; tensors of one shape."""

    mean: torch.Tensor
    deviation: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class LayerAttention:
    """Attention that all visual tokens of a sample receive together, [L], spread over samples."""

    self_attention: Spread
    cross_attention: Spread


@dataclasses.dataclass(frozen=True, eq=False)
class TopShare:
    """Share of a sample's received attention that its most attended tokens hold, [fractions, L], over samples.

    Attributes:
        fractions: of the sample's visual tokens. Uniform attention gives each fraction itself.
        self_attention: share of received self attention.
        cross_attention: share of received cross attention.
    """

    fractions: tuple[float, ...]
    self_attention: Spread
    cross_attention: Spread


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


@dataclasses.dataclass(frozen=True, eq=False)
class SizeStability:
    """Recipes of one budget, fitted from so many samples drawn with replacement.

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


@dataclasses.dataclass(frozen=True, eq=False)
class RankAgreement:
    """Spearman's correlation of token scores between layers, mean over samples.

    Attributes:
        matrix: [L, L]; NaN where no sample has differing scores in both layers.
        samples: samples that count, those with two tokens or more.
    """

    matrix: torch.Tensor
    samples: int


@dataclasses.dataclass(frozen=True, eq=False)
class PositionBias:
    """Where on the image attention lies: each sample divided by its mean over tokens, then the mean over samples.

    Attributes:
        side: the grid is side x side tokens.
        samples: samples of this grid; others do not count.
        by_row: for each of KINDS, [L, side]; 1 where a row receives as much as the mean token.
        by_column: the same by image column.
        grid: for each of KINDS, [side, side], mean over layers.
    """

    side: int
    samples: int
    by_row: dict[str, torch.Tensor]
    by_column: dict[str, torch.Tensor]
    grid: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """All that `analyze` finds.

    Attributes:
        stats: all samples of all data, each once; the parts but `data` are theirs.
        sources: name -> statistics as given.
        layers: received attention.
        top_share: how concentrated it is.
        tolerance: what a tolerance removes.
        budgets: one for each budget.
        sizes: stability over calibration size, for each budget and size.
        data: stability over data, for each budget; empty where there is nothing to compare.
        ranks: agreement of scores between layers; None where no sample has two tokens.
        position: position bias; None where tokens form no square grid.
        resamples: draws for each size.
        seed: of the draws.
        notes: what was left out, and why.
    """

    stats: AttentionStats
    sources: Mapping[str, AttentionStats]
    layers: LayerAttention
    top_share: TopShare
    tolerance: ToleranceCurve
    budgets: tuple[FittedBudget, ...]
    sizes: tuple[SizeStability, ...]
    data: tuple[DataStability, ...]
    ranks: RankAgreement | None
    position: PositionBias | None
    resamples: int
    seed: int
    notes: tuple[str, ...]


def analyze(
    stats: AttentionStats | Mapping[str, AttentionStats],
    *,
    budgets: Sequence[float] = BUDGETS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Analysis:
    """Analyse attention statistics, and how stable the recipes are that they give.

    Args:
        stats: from `measure`; or several by name, of one model on different data, whose recipes are compared. Of one
            alone, two random halves are compared.
        budgets: FLOPs reductions to fit, different from each other.
        resamples: draws for each calibration size.
        seed: of the draws and halves.

    Returns:
        All parts. The same statistics, settings and versions give the same figures.

    Raises:
        ValueError: no statistics, statistics without samples or of different models, no budget, one that stands twice
            or cannot be met, or `resamples` below 1.

    Source: arXiv:2409.10197 for what is looked at.
    """
    sources = {"statistics": stats} if isinstance(stats, AttentionStats) else stats
    if not isinstance(sources, Mapping) or not all(isinstance(part, AttentionStats) for part in sources.values()):
        raise ValueError(f"stats is a {type(stats).__name__}: must be AttentionStats, or several by name in a mapping")
    if empty := [name for name, part in sources.items() if len(part) == 0]:
        raise ValueError(f"statistics {empty[0]!r} hold no sample: measure at least one")
    if type(resamples) is not int or resamples < 1:
        raise ValueError(f"resamples={resamples!r}: must be an integer of at least 1")
    checked = [checked_budget("flops_reduction", value) for value in budgets]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"budgets={list(budgets)}: state at least one, and each once")
    joined = AttentionStats.concat(sources.values())
    fitter = Fitter(joined)
    fitted = _fit_budgets(fitter, checked)  # first: a budget that cannot be met is found before long work
    ranks, position = rank_agreement(joined), position_bias(joined)
    data, notes = _over_data(sources, fitter, checked, seed)
    return Analysis(
        stats=joined,
        sources=sources,
        layers=attention_per_layer(joined),
        top_share=top_share(joined),
        tolerance=tolerance_curve(fitter),
        budgets=fitted,
        sizes=stability_over_size(fitter, checked, resamples=resamples, seed=seed),
        data=data,
        ranks=ranks,
        position=position,
        resamples=resamples,
        seed=seed,
        notes=(*notes, *_left_out(joined, ranks, position)),
    )


def attention_per_layer(stats: AttentionStats) -> LayerAttention:
    """Sum what the visual tokens of each sample receive, layer by layer.

    A token's attention is a maximum over heads, so the sum may exceed 1.
    """
    totals = torch.empty(2, len(stats), stats.model.decoder.layers, dtype=torch.float64)
    for samples, received in _blocks(stats):
        totals[:, samples] = received.sum(3).transpose(1, 2)
    return LayerAttention(_spread(totals[0]), _spread(totals[1]))


def top_share(stats: AttentionStats, fractions: Sequence[float] = TOP_FRACTIONS) -> TopShare:
    """Find the share of received attention that the most attended fraction of a sample's tokens holds.

    Between whole tokens the share is interpolated. A sample that receives none at all in a layer counts as uniform.

    Raises:
        ValueError: a fraction is not above 0 and at most 1.
    """
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise ValueError(f"fractions holds {wrong[0]}: must be above 0 and at most 1")
    found = torch.empty(2, len(stats), len(fractions), stats.model.decoder.layers, dtype=torch.float64)
    for samples, received in _blocks(stats):
        count = received.shape[-1]
        held = _shares(received).sort(dim=3, descending=True).values.cumsum(3)
        held = torch.cat([torch.zeros_like(held[..., :1]), held], 3)  # held by the first 0, 1, ... tokens
        for number, fraction in enumerate(fractions):
            below = min(math.floor(fraction * count), count - 1)
            part = fraction * count - below
            share = held[..., below] + part * (held[..., below + 1] - held[..., below])
            found[:, samples, number] = share.transpose(1, 2)
    return TopShare(tuple(fractions), _spread(found[0]), _spread(found[1]))


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
    return ToleranceCurve(tuple(tolerances), reductions[:, 0], reductions[:, 1], _spread(alone))


def attention_loss(stats: AttentionStats, recipes: Sequence[PruningRecipe]) -> torch.Tensor:
    """Find the share of each layer's received attention that recipes lose, by the rule of inference.

    At each layer the tokens with the lowest score (self x cross) among those present leave, as many as the recipe
    says for the sample's size; of equal scores the later token stays, as in `selection.keep_highest`. What the layer's
    dense attention gave to tokens that are gone by its end is lost, as the fit counts it.

    Returns:
        [R, 2, L] fp64, self and cross, mean over samples.
    """
    layers = stats.model.decoder.layers
    unique = {recipe.keep: recipe for recipe in recipes}
    held = {keep: torch.zeros(2, layers, dtype=torch.float64) for keep in unique}
    for samples, received in _blocks(stats):
        count = received.shape[-1]
        order = (received[0] * received[1]).argsort(dim=2, stable=True)
        shares = _shares(received).transpose(0, 1).float().contiguous()  # [L, 2, B, N]; half the traffic
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
            held[keep] += torch.stack(left, 1)
    return 1 - torch.stack([held[recipe.keep] for recipe in recipes]) / len(stats)


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
    """
    available, n = len(fitter.stats), fitter.visual_tokens
    generator = torch.Generator().manual_seed(seed)
    drawn: list[tuple[Budget, int]] = []
    recipes: list[PruningRecipe] = []
    for size in sorted({size for size in sizes if size < available} | {available}):
        draws = torch.randint(available, (resamples, size), generator=generator).tolist()
        fitters = [fitter.resampled(draw) for draw in draws]
        for budget in budgets:
            drawn.append((budget, size))
            recipes += [own.fit(budget) for own in fitters]
    whole = {budget: torch.tensor(fitter.fit(budget).kept(n)) for budget in budgets}
    losses = attention_loss(fitter.stats, recipes).mean((1, 2))
    found = []
    for number, (budget, size) in enumerate(drawn):
        rows = slice(number * resamples, (number + 1) * resamples)
        own = recipes[rows]
        kept = torch.tensor([recipe.kept(n) for recipe in own])
        found.append(
            SizeStability(
                flops_reduction=budget.value,
                samples=size,
                removed=_spread(torch.tensor([recipe.counts(n) for recipe in own])),
                kept=_spread(kept),
                tolerance=_spread(torch.tensor([recipe.provenance["tolerance"] for recipe in own])),
                distance=_spread(recipe_distance(kept, whole[budget])),
                attention_loss=_spread(losses[rows]),
            )
        )
    return tuple(sorted(found, key=lambda part: (budgets.index(_budget(part)), part.samples)))


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
    found = []
    for number, budget in enumerate(budgets):
        kept = torch.tensor([recipe.kept(visual_tokens) for recipe in recipes[number]])
        own = losses[number * len(fitters) :][: len(fitters)]
        distance = recipe_distance(kept[:, None], kept[None])
        found.append(DataStability(budget.value, tuple(sources), kept, distance, own))
    return tuple(found)


def halves(stats: AttentionStats, *, seed: int = 0) -> dict[str, AttentionStats]:
    """Split the samples into two random halves; of an odd number the second is larger.

    Raises:
        ValueError: there is only one sample.
    """
    if len(stats) < 2:
        raise ValueError(f"stats holds {len(stats)} sample: must be at least 2 to split")
    order = torch.randperm(len(stats), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = len(order) // 2
    return {"half 1": stats.select(sorted(order[:middle])), "half 2": stats.select(sorted(order[middle:]))}


def rank_agreement(stats: AttentionStats) -> RankAgreement | None:
    """Correlate the ranks of a sample's token scores between layers (Spearman, equal scores share their mean rank)."""
    layers = stats.model.decoder.layers
    total, defined = torch.zeros(layers, layers, dtype=torch.float64), torch.zeros(layers, layers)
    counted = 0
    for samples, received in _blocks(stats):
        if received.shape[-1] < 2:
            continue
        score = (received[0] * received[1]).transpose(0, 1).contiguous()  # [B, L, N]
        ordered = score.sort(dim=2).values
        rank = torch.searchsorted(ordered, score) + torch.searchsorted(ordered, score, right=True)
        centred = rank.double() - rank.double().mean(2, keepdim=True)
        norm = centred.norm(dim=2, keepdim=True)
        unit = torch.where(norm > 0, centred / norm, torch.zeros_like(centred))
        total += (unit @ unit.transpose(1, 2)).sum(0)
        varies = (norm[..., 0] > 0).float()
        defined += varies.T @ varies
        counted += len(samples)
    return RankAgreement(total / defined, counted) if counted else None


def position_bias(stats: AttentionStats) -> PositionBias | None:
    """Average attention by image row and column, where the usual token count is a square grid; else None.

    Statistics do not say how tokens lie on images: several images whose tokens add up to a square look like one.
    """
    count = stats.usual_visual_tokens
    side = math.isqrt(count)
    if side * side != count or side < 2:
        return None
    layers, samples = stats.model.decoder.layers, stats.visual_tokens.count(count)
    total = torch.zeros(3, layers, side, side, dtype=torch.float64)
    for _, received in _blocks(stats):
        if received.shape[-1] == count:
            kinds = torch.cat([received, (received[0] * received[1])[None]])
            total += (_shares(kinds) * count).sum(2).view(3, layers, side, side)
    mean = dict(zip(KINDS, total / samples, strict=True))
    return PositionBias(
        side=side,
        samples=samples,
        by_row={kind: grid.mean(2) for kind, grid in mean.items()},
        by_column={kind: grid.mean(1) for kind, grid in mean.items()},
        grid={kind: grid.mean(0) for kind, grid in mean.items()},
    )


def _fit_budgets(fitter: Fitter, budgets: Sequence[Budget]) -> tuple[FittedBudget, ...]:
    recipes = [fitter.fit(budget) for budget in budgets]
    losses = attention_loss(fitter.stats, recipes)
    return tuple(
        FittedBudget(budget.value, recipe, lost[0], lost[1], float(lost.mean()))
        for budget, recipe, lost in zip(budgets, recipes, losses, strict=True)
    )


def _over_data(
    sources: Mapping[str, AttentionStats], fitter: Fitter, budgets: Sequence[Budget], seed: int
) -> tuple[tuple[DataStability, ...], list[str]]:
    """Compare the data, or two halves of it; with notes."""
    notes = []
    if len(sources) > 1:
        held_by = Counter(digest for part in sources.values() for digest in set(part.digests))
        if shared := sum(times > 1 for times in held_by.values()):
            notes.append(f"data: {shared} samples stand in several of the statistics, which are then not independent")
        if len({str(part.provenance.get("weights")) for part in sources.values()}) > 1:
            notes.append("data: the statistics are of different weights; differences are not of the data alone")
    elif len(fitter.stats) > 1:
        sources = halves(fitter.stats, seed=seed)
    else:
        return (), ["stability over data: left out, one sample cannot be split; measure more"]
    return stability_over_data(sources, budgets, visual_tokens=fitter.visual_tokens), notes


def _left_out(stats: AttentionStats, ranks: RankAgreement | None, position: PositionBias | None) -> list[str]:
    """Say what was left out, and why."""
    notes, usual = [], stats.usual_visual_tokens
    if again := len(stats) - len(set(stats.digests)):
        notes.append(
            f"{again} of {len(stats)} samples are equal to earlier ones, and each counts: halves and draws are then "
            "not independent"
        )
    if unreached := [size for size in SIZES if size > len(stats)]:
        sizes = ", ".join(map(str, unreached))
        notes.append(f"calibration sizes {sizes}: left out, there are {len(stats)} samples; measure more")
    if len(counts := Counter(stats.visual_tokens)) > 1:
        notes.append(
            f"samples have {min(counts)} to {max(counts)} visual tokens: counts of tokens are for {usual}, "
            "the most common"
        )
    if ranks is None:
        notes.append("rank agreement: left out, no sample has two visual tokens")
    if position is None:
        notes.append(f"position bias: left out, {usual} visual tokens form no square grid")
    elif position.samples < len(stats):
        notes.append(f"position bias: of the {position.samples} samples with {usual} visual tokens alone")
    return notes


def _budget(part: SizeStability) -> Budget:
    return Budget("flops_reduction", part.flops_reduction)


def _blocks(stats: AttentionStats) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Give the samples a few at a time, of one token count each: indices, and self and cross [2, L, B, N] fp64."""
    ends = torch.tensor(stats.visual_tokens).cumsum(0)
    for count in sorted(set(stats.visual_tokens)):
        members = [index for index, own in enumerate(stats.visual_tokens) if own == count]
        for start in range(0, len(members), _BLOCK):
            samples = members[start : start + _BLOCK]
            columns = (ends[samples, None] - count + torch.arange(count)).flatten()
            both = torch.stack([stats.self_attention[:, columns], stats.cross_attention[:, columns]])
            yield samples, both.double().view(2, -1, len(samples), count)


def _shares(values: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over the last dimension; uniform where that is zero."""
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total, 1 / values.shape[-1])


def _spread(values: torch.Tensor) -> Spread:
    """Summarise over the first dimension."""
    values = values.double()
    low, high = torch.quantile(values, torch.tensor(INTERVAL, dtype=torch.float64), dim=0)
    return Spread(values.mean(0), values.std(0, correction=0), low, high)
