"""`fit_sequential`: the authors' own procedure, as the reference that the one-pass fit is compared with.

For every tolerance tried, every sample runs through the decoder again, with the tokens removed so far really gone, so
that attention is renormalised among those left. The dense totals come from saved statistics.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from tqdm import tqdm

from fitprune.calibration.measure import checked, measure
from fitprune.costs import flops
from fitprune.engine.remover import removing
from fitprune.engine.running import Choose
from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.inputs import input_digests, to_model
from fitprune.fitting.budget import Budget, checked_budget
from fitprune.fitting.fit import TOLERANCE_STEP
from fitprune.fitting.rules import lowest_in_both
from fitprune.fitting.stats import AttentionStats
from fitprune.recipes import rounding
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.view import LayerView


def fit_sequential(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    flops_reduction: float,
    stats: AttentionStats | None = None,
    tolerance_step: float = 0.01,
    progress: bool = False,
) -> PruningRecipe:
    """Fit a recipe as the authors' script does: layers re-run with tokens removed, for every tolerance tried.

    Slow by design: about seven passes over the calibration set for one budget. Use `fit` for real work.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        batches: one sample each (batch size 1); gone through once per tolerance.
        flops_reduction: fraction of the visual tokens' FLOPs to remove.
        stats: dense statistics of the same samples in the same order; None to measure them first.
        tolerance_step: width at which the bisection ends; the authors use 0.01.
        progress: show a progress bar.

    Returns:
        The recipe of the last feasible tolerance.

    Raises:
        ValueError: a batch holds several samples, `stats` is of another model or other samples, or the budget is out
            of range or not met even at tolerance 1.

    Source: arXiv:2409.10197, the authors' `statistical_analysis.py`. Differs from it: the last feasible tolerance is
    kept, not the last tried; sums that no token can leave give zero removals instead of an unset variable.
    """
    budget = checked_budget("flops_reduction", flops_reduction)
    if not tolerance_step >= TOLERANCE_STEP:
        raise ValueError(f"tolerance_step={tolerance_step}: must be at least {TOLERANCE_STEP}")
    batches = checked(batches)
    adapted = adapt(model)
    samples = list(batches)
    if any(len(batch["input_ids"]) != 1 for batch in samples):
        raise ValueError("batches hold several samples: fit_sequential takes one sample at a time, as the authors do")
    stats = stats if stats is not None else measure(adapted.model, samples, progress=progress)
    stats.model.require_same(adapted.fingerprint, what="stats")
    if stats.digests != tuple(input_digests(adapted, batch)[0] for batch in samples):
        raise ValueError(
            f"stats ({len(stats)} samples) are not of batches ({len(samples)} samples): "
            "must be the same samples in the same order; measure these batches"
        )

    def removed_at(tolerance: float) -> list[int] | None:
        return _removed(stats, _left(adapted, samples, stats, tolerance, progress=progress), budget)

    low, high, best = 0.0, 1.0, removed_at(1.0)
    if best is None:
        raise ValueError(f"flops_reduction={flops_reduction}: not met even at tolerance 1; ask for less")
    while high - low > tolerance_step + 1e-6:
        middle = (low + high) / 2
        if (removed := removed_at(middle)) is None:
            low = middle
        else:
            high, best = middle, removed
    n = stats.usual_visual_tokens
    provenance = {
        "source": "fitprune.fit_sequential",
        "budget": {"flops_reduction": flops_reduction},
        "tolerance": high,
        "reached": flops.visual_flops_reduction(adapted.fingerprint.decoder, n, best),
        "samples": len(samples),
    }
    return PruningRecipe(rounding.keep_fractions(best, n), adapted.fingerprint, n, provenance)


def _left(
    adapted: AdaptedModel,
    samples: Sequence[Mapping[str, Any]],
    stats: AttentionStats,
    tolerance: float,
    *,
    progress: bool,
) -> torch.Tensor:
    """Run every sample at a tolerance, and count the tokens left after each layer: [samples, layers]."""
    decoder, model = adapted.fingerprint.decoder, adapted.model
    totals = _totals(stats)
    left = torch.zeros(len(samples), decoder.layers, dtype=torch.long)
    for index, batch in enumerate(tqdm(samples, desc=f"tolerance {tolerance:.3f}", disable=not progress or None)):
        left[index] = stats.visual_tokens[index]  # of layers where none leave before the first removal
        rule = _within(totals[index], tolerance, left[index], decoder.prunable)
        with torch.no_grad(), removing(adapted, rule):
            model(**to_model(batch, model), use_cache=False, logits_to_keep=1)
    return left


def _removed(stats: AttentionStats, left: torch.Tensor, budget: Budget) -> list[int] | None:
    """Removals per layer, of the usual image's tokens, with which the budget is met; None if it is not."""
    decoder, totals = stats.model.decoder, stats.visual_tokens
    dense = sum(flops.visual_macs(decoder, total, [0] * decoder.layers) for total in totals)
    removed = torch.cat([torch.tensor(totals)[:, None], left[:, :-1]], 1) - left
    # The authors stop removing at the first layer where the tokens left already meet the budget to the end.
    for stop in range(decoder.layers + 1):
        head = removed.clone()
        head[:, stop:] = 0
        spent = sum(flops.visual_macs(decoder, *sample) for sample in zip(totals, head.tolist(), strict=True))
        if budget.met_by(1 - spent / dense):
            # As the authors: the mean over samples, rounded down; shares, since samples may differ in tokens.
            shares = [sum(Fraction(int(k), t) for k, t in zip(column, totals, strict=True)) for column in head.T]
            return [math.floor(share / len(stats) * stats.usual_visual_tokens) for share in shares]
    return None


def _totals(stats: AttentionStats) -> list[torch.Tensor]:
    """For each sample, the dense totals [2, layers] of received self and cross attention."""
    pairs = torch.stack([stats.self_attention, stats.cross_attention])
    return [part.sum(2) for part in torch.split(pairs, list(stats.visual_tokens), dim=2)]


def _within(totals: torch.Tensor, tolerance: float, left: torch.Tensor, prunable: Collection[int]) -> Choose:
    """Make the rule that removes what the tolerance allows.

    At each layer that tokens leave, it writes the count left from there on into `left` [layers].
    """

    def choose(view: LayerView) -> torch.Tensor | None:
        visual, layer = view.image >= 0, view.layer
        if view.before or view.layer not in prunable or not bool(visual.any()):
            return None
        now = view.received
        floor = ((1 - tolerance) * totals[:, layer]).to(visual.device)
        leaving = lowest_in_both(now.self_attention, now.cross_attention, visual, floor[:1], floor[1:])
        left[layer:] = (visual & ~leaving).sum()
        return ~leaving

    return choose
