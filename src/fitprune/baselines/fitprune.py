"""FitPrune (arXiv:2409.10197): counts fitted from attention statistics, tokens ranked by self x cross attention.

The control `random` has the same counts, and takes tokens by chance.
"""

from __future__ import annotations

from fitprune.baselines.base import Solution, Target, baseline
from fitprune.fitting.budget import Budget
from fitprune.fitting.fit import Fitter


def _fitted(target: Target, budget: Budget) -> Solution:
    """FitPrune's own counts."""
    if not isinstance(target, Fitter):
        raise ValueError("FitPrune's counts are fitted from statistics: measure the model, and pass a Fitter of them")
    n = target.visual_tokens
    recipe = target.fit(budget)
    kept = recipe.kept(n)
    return ([n, *kept[:-1]], kept), {"tolerance": recipe.provenance["tolerance"]}


fitprune = baseline(scorer="fitprune", source="FitPrune, arXiv:2409.10197")(_fitted)
random = baseline(scorer="random", source="control: FitPrune's counts, tokens by chance")(_fitted)
