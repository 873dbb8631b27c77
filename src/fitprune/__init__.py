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

__version__ = "0.1.0"

_HOMES = {
    "AttentionStats": "stats",
    "LatencyProfile": "profiles",
    "Pruner": "pruning",
    "PruningRecipe": "recipe",
    "Sample": "calibration",
    "analyze": "analysis",
    "attach": "pruning",
    "evaluate": "evaluation",
    "fit": "fitting",
    "fit_output": "output_fitting",
    "fit_sequential": "sequential",
    "kept_positions": "pruning",
    "load_model": "loading",
    "load_samples": "calibration",
    "make_batches": "batches",
    "measure": "measurement",
    "merge": "stats",
    "profile_latency": "profiling",
    "prune": "pruning",
    "time_recipes": "benchmark",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from fitprune.analysis import analyze as analyze
    from fitprune.batches import make_batches as make_batches
    from fitprune.benchmark import time_recipes as time_recipes
    from fitprune.calibration import Sample as Sample
    from fitprune.calibration import load_samples as load_samples
    from fitprune.evaluation import evaluate as evaluate
    from fitprune.fitting import fit as fit
    from fitprune.loading import load_model as load_model
    from fitprune.measurement import measure as measure
    from fitprune.output_fitting import fit_output as fit_output
    from fitprune.profiles import LatencyProfile as LatencyProfile
    from fitprune.profiling import profile_latency as profile_latency
    from fitprune.pruning import Pruner as Pruner
    from fitprune.pruning import attach as attach
    from fitprune.pruning import kept_positions as kept_positions
    from fitprune.pruning import prune as prune
    from fitprune.recipe import PruningRecipe as PruningRecipe
    from fitprune.sequential import fit_sequential as fit_sequential
    from fitprune.stats import AttentionStats as AttentionStats
    from fitprune.stats import merge as merge


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fitprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fitprune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
