"""Set the one-pass fit beside the authors' layer-by-layer procedure on the bundled model.

    python benchmarks/fits.py [--samples 64]

Prints, for each budget, removals per layer of both, tolerance, what is reached, accuracy and agreement on the bundled
test set, and the seconds each took; one JSON document last.
"""

from __future__ import annotations

import argparse
import json
import time

from transformers import AutoModelForImageTextToText, AutoProcessor

from fitprune import evaluate, fit, fit_sequential, load_samples, make_batches, measure
from fitprune._support import assets
from fitprune.evaluation.results import table

BUDGETS = (0.4, 0.6, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    args = parser.parse_args()
    source = assets.folder("model")
    model = AutoModelForImageTextToText.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    batches = list(make_batches(load_samples(assets.folder("calibration"), samples=args.samples), processor))

    started = time.perf_counter()
    stats = measure(model, batches)
    seconds = {"measure": time.perf_counter() - started}
    recipes = {}
    for budget in BUDGETS:
        for name, run in (("fit", fit), ("sequential", fit_sequential)):
            started = time.perf_counter()
            if run is fit:
                recipe = fit(stats, flops_reduction=budget)
            else:
                recipe = fit_sequential(model, batches, flops_reduction=budget, stats=stats)
            seconds[f"{name} {budget}"] = time.perf_counter() - started
            recipes[f"{name} {budget}"] = recipe
            print(
                f"{budget:.0%} {name:10}  removed {recipe.counts(144)}  reached {recipe.cost().flops_reduction:.4f}  "
                f"tolerance {recipe.provenance['tolerance']:.4f}  {seconds[f'{name} {budget}']:.2f} s",
                flush=True,
            )
    results = evaluate(model, processor, load_samples(assets.folder("test")), recipes, batch_size=32, timed_batches=0)
    print(table(results))
    removed = {name: recipe.counts(144) for name, recipe in recipes.items()}
    accuracy = {row.method: [row.accuracy, row.agreement] for row in results.rows}
    print(json.dumps({"removed": removed, "accuracy_and_agreement": accuracy, "seconds": seconds}))


if __name__ == "__main__":
    main()
