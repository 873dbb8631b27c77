"""What merging a fit to few layers that remove costs in accuracy, on the bundled model and both of its tasks.

    python benchmarks/removal_layers.py [--every 1]

Prints, for each budget and each most number of removal layers, removals per layer, extra loss of attention and seconds
of the fit, then accuracy and agreement on each task; one JSON document last.
"""

from __future__ import annotations

import argparse
import json
import time

from transformers import AutoModelForImageTextToText, AutoProcessor

from fitprune import evaluate, load_samples, make_batches, measure
from fitprune._support import assets
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter

BUDGETS = (0.4, 0.6, 0.8, 0.9)
AT_MOST = (1, 2, 4, 6, None)
TASKS = (assets.MODEL, "digit-details")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="ask every N-th question")
    args = parser.parse_args()
    source = assets.folder("model")
    model = AutoModelForImageTextToText.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    calibration = [sample for task in TASKS for sample in load_samples(assets.folder("calibration", task))]
    fitter = Fitter(measure(model, make_batches(calibration, processor, batch_size=16)))

    recipes, figures = {}, {}
    for budget in BUDGETS:
        for at_most in AT_MOST:
            started = time.perf_counter()
            recipe = fitter.fit(checked_budget("flops_reduction", budget), at_most)
            seconds = time.perf_counter() - started
            name = f"{budget:.0%} {at_most or 'all'}"
            recipes[name] = recipe
            figures[name] = {
                "removed": recipe.counts(fitter.visual_tokens),
                "layers": len(recipe.removing),
                "extra_loss": recipe.provenance.get("extra_loss", 0.0),
            }
            print(f"{name:8} {figures[name]} {seconds:.2f} s", flush=True)
    tests = {task: load_samples(assets.folder("test", task))[:: args.every] for task in TASKS}
    results = evaluate(model, processor, tests, recipes, batch_size=40, timed_batches=0, progress=True)
    for row in results.rows:
        print(f"{row.task:14} {row.method:8} accuracy {100 * row.accuracy:5.1f}  agreement {100 * row.agreement:5.1f}")
        if row.method in figures:
            figures[row.method][row.task] = [row.accuracy, row.agreement]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
