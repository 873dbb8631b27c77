"""Fit a visual-token pruning recipe for a multimodal LLM to a budget, and run the model faster with it.

stats = measure(model, batches)
recipe = fit(stats, flops_reduction=0.6)
with prune(model, recipe):
    model.generate(**inputs)

Importing this package imports neither torch nor transformers: names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fitprune._version import __version__ as __version__

_HOMES = {
    "AttentionStats": "fitting.stats",
    "Family": "families.table",
    "Fitter": "fitting.fit",
    "Grid": "families.grids",
    "KeptImage": "pictures.kept",
    "LatencyProfile": "costs.latency",
    "LayerView": "scoring.view",
    "Pruner": "engine.pruner",
    "PruningRecipe": "recipes.recipe",
    "Results": "evaluation.results",
    "Sample": "calibration.samples",
    "Scorer": "scoring.scorers",
    "Sizes": "baselines.base",
    "analyze": "analysis.analyze",
    "attach": "engine.prune",
    "checked_budget": "fitting.budget",
    "draw_kept": "pictures.draw",
    "evaluate": "evaluation.evaluate",
    "fit": "fitting.fit",
    "fit_sequential": "baselines.authors_fit",
    "kept_positions": "engine.prune",
    "kept_tokens": "pictures.kept",
    "load_model": "families.loading",
    "load_samples": "calibration.samples",
    "make_batches": "calibration.batches",
    "make_method": "baselines.table",
    "measure": "calibration.measure",
    "profile_latency": "speed.profiling",
    "prune": "engine.prune",
    "register_baseline": "baselines.table",
    "register_family": "families.table",
    "register_scorer": "scoring.scorers",
    "search": "output_search.search",
    "time_recipes": "speed.time_recipes",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from fitprune.analysis.analyze import analyze as analyze
    from fitprune.baselines.authors_fit import fit_sequential as fit_sequential
    from fitprune.baselines.base import Sizes as Sizes
    from fitprune.baselines.table import make_method as make_method
    from fitprune.baselines.table import register_baseline as register_baseline
    from fitprune.calibration.batches import make_batches as make_batches
    from fitprune.calibration.measure import measure as measure
    from fitprune.calibration.samples import Sample as Sample
    from fitprune.calibration.samples import load_samples as load_samples
    from fitprune.costs.latency import LatencyProfile as LatencyProfile
    from fitprune.engine.prune import attach as attach
    from fitprune.engine.prune import kept_positions as kept_positions
    from fitprune.engine.prune import prune as prune
    from fitprune.engine.pruner import Pruner as Pruner
    from fitprune.evaluation.evaluate import evaluate as evaluate
    from fitprune.evaluation.results import Results as Results
    from fitprune.families.grids import Grid as Grid
    from fitprune.families.loading import load_model as load_model
    from fitprune.families.table import Family as Family
    from fitprune.families.table import register_family as register_family
    from fitprune.fitting.budget import checked_budget as checked_budget
    from fitprune.fitting.fit import Fitter as Fitter
    from fitprune.fitting.fit import fit as fit
    from fitprune.fitting.stats import AttentionStats as AttentionStats
    from fitprune.output_search.search import search as search
    from fitprune.pictures.draw import draw_kept as draw_kept
    from fitprune.pictures.kept import KeptImage as KeptImage
    from fitprune.pictures.kept import kept_tokens as kept_tokens
    from fitprune.recipes.recipe import PruningRecipe as PruningRecipe
    from fitprune.scoring.scorers import Scorer as Scorer
    from fitprune.scoring.scorers import register_scorer as register_scorer
    from fitprune.scoring.view import LayerView as LayerView
    from fitprune.speed.profiling import profile_latency as profile_latency
    from fitprune.speed.time_recipes import time_recipes as time_recipes


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fitprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fitprune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
