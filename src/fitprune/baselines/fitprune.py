"""FitPrune (arXiv:2409.10197): counts fitted from attention statistics, tokens ranked by self x cross attention.

The control `random` has the same counts, and takes tokens by chance.
"""

from __future__ import annotations

from fitprune.baselines.base import Solution, Target, baseline
from fitprune.fitting.budget import Budget
from fitprune.fitting.fit import Fitter


def _fitted(target: Target, budget: Budget) -> Solution:
    """FitPrune's own counts."""
    assert isinstance(target, Fitter)  # since it needs statistics
    recipe = target.fit(budget)
    return recipe.layer_counts(target.visual_tokens), {
        name: recipe.provenance[name] for name in ("tolerance", "samples")
    }


fitprune = baseline(scorer="fitprune", source="FitPrune, arXiv:2409.10197", needs_statistics=True)(_fitted)
random = baseline(scorer="random", source="control: FitPrune's counts, tokens by chance", needs_statistics=True)(
    _fitted
)
