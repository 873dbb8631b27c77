"""How much calibration the fit on what the model says needs: agreement with dense on test questions, by draws.

    python training/render.py --out data --calibration 256
    python benchmarks/calibration_size.py --data data/digit_scenes/calibration data/digit_details/calibration

The bundled model. Each draw takes as many samples of each --data, searches on half of them and validates on the other;
the paper's rule is fitted to the same draw. Prints a JSON line for each draw.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fitprune import PruningRecipe, evaluate, load_samples, make_batches, measure
from fitprune._support import assets
from fitprune.calibration.samples import Sample, recombined
from fitprune.evaluation.entries import Entry
from fitprune.fitting.budget import checked_budget
from fitprune.output_search.search import Searcher


def agreement(
    model: Any, processor: Any, test: Sequence[Sample], recipes: dict[str, PruningRecipe]
) -> dict[str, float]:
    """Share of the questions that each recipe answers as the dense model does."""
    entries = [Entry(name, recipe) for name, recipe in recipes.items()]
    rows = evaluate(model, processor, test, entries, batch_size=40, timed_batches=0).rows
    return {row.method: row.agreement for row in rows if row.method in recipes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--flops-reduction", type=float, default=0.8)
    parser.add_argument("--passes", type=float, default=20)
    args = parser.parse_args()
    folder = assets.folder("model")
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    pools = [load_samples(data) for data in args.data]
    test = load_samples(assets.folder("test"))[::4] + load_samples(assets.folder("test", "digit-details"))[::4]
    budget = checked_budget("flops_reduction", args.flops_reduction)
    for size in args.sizes:
        for draw in range(args.draws):
            rng = np.random.default_rng([draw, size])
            share = size // len(pools)
            drawn = [pool[i] for pool in pools for i in rng.permutation(len(pool))[:share]]
            samples = [drawn[i] for i in rng.permutation(len(drawn))]
            halves = samples[: len(samples) // 2], samples[len(samples) // 2 :]
            search, validation = (
                make_batches(recombined(half, 4, seed=draw), processor, batch_size=16) for half in halves
            )
            stats = measure(model, make_batches(samples, processor, batch_size=16))
            fitter = Searcher(model, search, stats, validation=validation, unit=len(samples), seed=draw)
            recipe = fitter.fit([budget], passes=args.passes)[0]
            recipes = {"paper": fitter.fitter.fit(budget), "output": recipe}
            line = {"samples": len(samples), "draw": draw, "chosen": recipe.provenance["chosen"]}
            print(json.dumps(line | agreement(model, processor, test, recipes)), flush=True)


if __name__ == "__main__":
    main()
