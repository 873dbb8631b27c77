"""DART (arXiv:2502.11494): one removal before layer k, of the tokens that duplicate a few pivots most.

Differs from the authors' code: exactly the tokens of the budget stay (theirs: 4 + 8 floor(T / 8)), and pivots take
turns in falling order of their keys, not in that of a Python set.
"""

from __future__ import annotations

from fitprune.baselines.base import FIRST_LAYER, Solution, Target, baseline, before, latest, require_layer, solve
from fitprune.fitting.budget import Budget, OutOfReach


@baseline(scorer="duplication", source="DART, arXiv:2502.11494", k=FIRST_LAYER)
def dart(target: Target, budget: Budget, *, k: int | None = None) -> Solution:
    """One removal before layer k, which needs the keys of the layer before it."""
    require_layer("dart", k, target)
    if target.model.decoder.layers < 2:
        raise OutOfReach("dart reads the keys of the layer before, and the model has one layer")
    layer = latest(target, budget, before, 2, 1) if k is None else k
    if layer - 1 in target.model.decoder.linear_layers:
        raise OutOfReach(
            f"dart reads the keys of layer {layer - 1}, which has no attention in a {target.model.model_type} model"
        )
    return solve(target, budget, lambda count: before(target, layer, count), f"dart with k={layer}"), {"k": layer}
