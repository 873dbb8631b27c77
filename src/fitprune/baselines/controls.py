"""Controls: schedules that were never published, against which a method must win.

`random` is in fitprune.py: it has FitPrune's counts.
"""

from __future__ import annotations

from fitprune.baselines.base import Solution, Target, baseline, before_decoder
from fitprune.baselines.vtw import remove_all_late
from fitprune.fitting.budget import Budget, OutOfReach
from fitprune.fitting.leftover import give_back


@baseline(scorer="random", source="control: tokens by chance before the decoder")
def random_input(target: Target, budget: Budget) -> Solution:
    """One removal, before the first layer."""
    return before_decoder("random-input", target, budget)


@baseline(scorer="fitprune", source="control: as many at each layer, FitPrune's scores")
def uniform(target: Target, budget: Budget) -> Solution:
    """The same number leaves at every layer that tokens may leave, as long as there are any."""
    decoder, n = target.model.decoder, target.visual_tokens
    passed = [sum(layer <= last for layer in decoder.prunable) for last in range(decoder.layers)]

    def kept(rate: float) -> list[int]:
        return [max(0, round(n - removals * rate)) for removals in passed]

    def fits(rate: float) -> bool:
        return budget.met_by(budget.measured(decoder, n, kept(rate)))

    low, high = 0.0, float(n)
    if not fits(high):
        raise OutOfReach(f"uniform cannot meet {budget.kind}={budget.value}: ask for less")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    counts = give_back(budget, decoder, n, kept(high))
    return ([n, *counts[:-1]], counts), {"removed_per_layer": round(high, 2)}


last_layer_first = baseline(scorer="fitprune", source="control: as late as possible, FitPrune's scores")(
    remove_all_late
)
