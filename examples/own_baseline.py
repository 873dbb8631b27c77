"""A baseline of your own: registered by name, solved for a budget, and evaluated. Needs no network.

Run it from any folder: `python own_baseline.py`. What a schedule is, and how a package brings a baseline to every
process: docs/extending.md.
"""

from fitprune import Sizes, checked_budget, evaluate, load_model, load_samples, make_method, register_baseline
from fitprune.baselines.base import baseline, before, solve
from fitprune.families.config import fingerprint_of


@baseline(scorer="max-min", source="an example", layer="before which tokens leave; by default the middle layer")
def half_way(target, budget, *, layer=None):
    """One removal, before one layer, of the tokens that resemble others most."""
    at = target.model.decoder.layers // 2 if layer is None else layer
    return solve(target, budget, lambda count: before(target, at, count), f"half-way at {at}"), {"layer": at}


register_baseline("half-way", half_way)

model, processor = load_model("digit-scenes")  # the small LLaVA in the package
target, budget = Sizes(fingerprint_of(model.config), visual_tokens=144), checked_budget("flops_reduction", 0.5)
methods = {name: make_method(name, target, budget) for name in ("half-way", "half-way:layer=2", "divprune")}
for name, recipe in methods.items():
    print(f"{name}: {[round(144 * share) for share in recipe.entering]} visual tokens enter the layers")
for row in evaluate(model, processor, load_samples("digit-scenes/test", samples=16), methods, timed_batches=0).rows:
    print(f"{row.method}: accuracy {row.accuracy:.2f}")
