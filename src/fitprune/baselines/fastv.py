"""FastV (arXiv:2403.06764): one removal, by what the prompt's last token attends to in layer k - 1.

Differs from the authors' code: tokens leave inside layer k - 1, after its attention, not at its end. What stays has
the same values; the MLP of that layer does not run for what goes, so a budget keeps a few tokens more here.
"""

from __future__ import annotations

from fitprune.baselines.base import FIRST_LAYER, Solution, Target, baseline, inside, latest, require_layer, solve
from fitprune.fitting.budget import Budget


@baseline(scorer="last", source="FastV, arXiv:2403.06764", k=FIRST_LAYER)
def fastv(target: Target, budget: Budget, *, k: int | None = None) -> Solution:
    """One removal, by layer k - 1's attention and inside that layer."""
    require_layer("fastv", k, target)
    layer = latest(target, budget, inside, 1, 0) if k is None else k - 1
    counts = solve(target, budget, lambda count: inside(target, layer, count), f"fastv with k={layer + 1}")
    return counts, {"k": layer + 1, "r": round(1 - counts[1][-1] / target.visual_tokens, 4)}
