"""`analyze`: what attention statistics look like, and how firmly they fix a recipe. Knows no model.

Each part is a function of its own on `AttentionStats`; `analyze` runs them all. Samples are taken a few at a time,
those of one visual-token count together, so the working set stays small and nothing is padded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from fitprune.analysis.attention import (
    LayerAttention,
    PositionBias,
    RankAgreement,
    TopShare,
    attention_per_layer,
    position_bias,
    rank_agreement,
    top_share,
)
from fitprune.analysis.stability import (
    RESAMPLES,
    SIZES,
    DataStability,
    FittedBudget,
    SizeStability,
    ToleranceCurve,
    fit_budgets,
    halves,
    stability_over_data,
    stability_over_size,
    tolerance_curve,
)
from fitprune.fitting.budget import Budget, checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.fitting.stats import AttentionStats

BUDGETS = (0.4, 0.6, 0.8)  # FLOPs reductions
FEW = 64  # samples; what fewer show describes them as much as the model


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """All that `analyze` finds.

    Attributes:
        stats: all samples of all data, each once; the parts but `data` are theirs.
        sources: name -> its statistics.
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
        ValueError: no statistics, statistics without samples or of different models, no budget, one that is listed
            twice or cannot be met, or `resamples` below 1.

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
        raise ValueError(f"budgets={list(budgets)}: pass at least one, and each once")
    joined = AttentionStats.concat(sources.values())
    fitter = Fitter(joined)
    fitted = fit_budgets(fitter, checked)  # first: a budget that cannot be met is found before long work
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


def _over_data(
    sources: Mapping[str, AttentionStats], fitter: Fitter, budgets: Sequence[Budget], seed: int
) -> tuple[tuple[DataStability, ...], list[str]]:
    """Compare the data, or two halves of it; with notes."""
    notes = []
    if len(sources) > 1:
        uses = Counter(digest for part in sources.values() for digest in set(part.digests))
        if shared := sum(times > 1 for times in uses.values()):
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
    if len(stats) < FEW:
        notes.append(f"{len(stats)} samples are few: below {FEW}, the figures describe them as much as the model")
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
