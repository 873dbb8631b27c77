"""Speed at full size, random weights in bf16: the figures of docs/speed.md.

    python benchmarks/full_size.py [--random-model llava-1.5-7b] [--part prefill|layers|latency|decode ...] -o FILE

prefill: the published recipes and ours of at most 8 removal layers. layers: the published recipes merged to at most 4,
8 and 16 removal layers, at equal FLOPs and counts as near to theirs as can be, and all of theirs. latency: recipes
fitted to a latency, by a profile that is measured first, and what they then reach. decode: 16 steps after the prefill.
Statistics are those of one image of noise, since speed is meant. Prints tables, writes one JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from fitprune import PruningRecipe, profile_latency, time_recipes
from fitprune.calibration.measure import measure
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.few_layers import merge_layers, prices_of
from fitprune.fitting.fit import Fitter
from fitprune.recipes.rounding import keep_fractions
from fitprune.speed import random_models
from fitprune.speed.timings import as_json, table

BUDGETS = (0.4, 0.6, 0.8, 0.9)


def merged(recipe: PruningRecipe, at_most: int | None) -> PruningRecipe:
    """Merge a recipe's removals to at most n layers at equal FLOPs.

    Taken is that each layer loses 2% of its attention with the tokens that the recipe leaves it, and ever less of the
    rest.
    """
    if at_most is None:
        return recipe
    decoder, n = recipe.model.decoder, recipe.visual_tokens
    budget = checked_budget("flops_reduction", recipe.cost().flops_reduction)
    lost = 0.02 ** (torch.arange(n + 1) / torch.tensor(recipe.kept(n))[:, None])
    reached = torch.arange(decoder.layers) >= torch.tensor(decoder.prunable)[:, None]
    lost = lost * reached[..., None]
    kept, _ = merge_layers(recipe.kept(n), lost, prices_of(budget, decoder, n), decoder.prunable, at_most)
    removed = [before - after for before, after in itertools.pairwise([n, *kept])]
    return PruningRecipe(keep_fractions(removed, n), recipe.model, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-model", default="llava-1.5-7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 2, 3, 2], help="of each part")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--part", nargs="+", default=["prefill", "layers", "latency", "decode"])
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    model = random_models.build(args.random_model, device=args.device)
    inputs = random_models.make_inputs(args.random_model, model, batch=args.batch_size)
    fitter = Fitter(measure(model, [random_models.make_inputs(args.random_model, model)]))
    figures: dict[str, Any] = {}

    def flops(value: float, most: int | None) -> PruningRecipe:
        return fitter.fit(checked_budget("flops_reduction", value), most)

    rounds = dict(zip(args.part, args.rounds, strict=False))

    def run(name: str, recipes: dict[str, PruningRecipe], new_tokens: int = 1, **options: Any) -> list[Any]:
        timings = time_recipes(model, inputs, recipes, new_tokens=[new_tokens], rounds=rounds[name], **options)
        print(name, table(timings), sep="\n", flush=True)
        figures[name] = as_json(timings, model)
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        return timings

    published = {}
    for b in args.budgets:
        with contextlib.suppress(ValueError):  # not every model has recipes, or one for each budget
            published[f"published {100 * b:g}%"] = PruningRecipe.published(args.random_model, round(100 * b))
    if "prefill" in args.part:
        run("prefill", published | {f"ours {100 * b:g}%": flops(b, 8) for b in args.budgets})
    if "layers" in args.part:
        mosts = (4, 8, 16, None)
        run("layers", {f"{name}, {k or 'all'}": merged(recipe, k) for name, recipe in published.items() for k in mosts})
    if "latency" in args.part:
        profile = profile_latency(model, inputs, repeats=rounds["latency"])
        wanted = {
            f"latency -{value:.0%}": fitter.fit(checked_budget("prefill_latency_reduction", value, profile), 8)
            for value in (0.3, 0.45, 0.6)
        }
        timings = run("latency", wanted, profile=profile)
        for timing in timings[1:]:
            recipe = wanted[timing.name]
            predicted = profile.prefill_seconds(recipe.visual_tokens, recipe.kept(recipe.visual_tokens))
            ratios = [b / a for a, b in zip(timings[0].prefill_seconds, timing.prefill_seconds, strict=True)]
            row = {
                "predicted seconds": predicted,
                "measured seconds": timing.seconds,
                "predicted of dense": 1 - recipe.provenance["reached"],
                "measured of dense": statistics.median(ratios),
            }
            figures["latency"].setdefault("predictions", {})[timing.name] = row
            print(timing.name, {what: round(value, 3) for what, value in row.items()}, flush=True)
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if "decode" in args.part:
        run("decode", {name: recipe for name, recipe in published.items() if "60" in name or "80" in name}, 17)


if __name__ == "__main__":
    main()
