"""VTW (arXiv:2405.05803): every visual token leaves at one late layer.

Differs from the authors' code: one layer is a coarse step, so the tokens that still fit stay one layer more. No score
ranks them: they are the last of the prompt.
"""

from __future__ import annotations

from fitprune.baselines.base import Counts, Solution, Target, baseline, inside, latest, solve
from fitprune.fitting.budget import Budget


def remove_all_late(target: Target, budget: Budget) -> Solution:
    """Everything leaves, as late as the budget allows: in layer k, but for what still fits in one layer more."""
    layers, n = target.model.decoder.layers, target.visual_tokens
    k = latest(target, budget, inside, layers - 1, 0)

    def counts(count: int) -> Counts:
        kept = [n] * k + [count] + [0] * (layers - k - 1)
        return [n, *kept[:-1]], kept

    return solve(target, budget, counts, "removing everything inside layer 0"), {"k": k + 1}


vtw = baseline(scorer="place", source="VTW, arXiv:2405.05803")(remove_all_late)
