"""What measuring costs: beside the same dense forwards, and beside the authors' layer-by-layer procedure.

    python benchmarks/measuring.py [--random-model llava-1.5-7b]

On the bundled model: `measure` of 64 samples in turn with the dense forwards of the same batches, of 1, 8 and 16; then
statistics, one budget and nine more, against `fit_sequential` with eager attention, which tries each tolerance by
running all samples; then decoding, 256 steps, dense and pruned in turn. With --random-model, `measure` of one image
on random weights in bf16 beside its dense forward instead.
Prints medians and ratios; one JSON document last.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fitprune import fit_sequential, load_model, load_samples, make_batches, measure, prune
from fitprune._support import assets
from fitprune.fitting.budget import checked_budget
from fitprune.fitting.fit import Fitter
from fitprune.speed import random_models
from fitprune.speed.clocks import device_name
from fitprune.speed.in_turn import Block, decode_seconds, time_ratios

ROUNDS = 5


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def beside_dense(model: Any, batches: Sequence[Mapping[str, Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Time `measure` and the dense forwards in turn; the first round does not count."""

    def dense() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False, logits_to_keep=1)

    spent = [(seconds_of(dense), seconds_of(lambda: measure(model, batches))) for _ in range(rounds + 1)][1:]
    return {
        "dense forwards": statistics.median(a for a, _ in spent),
        "measure": statistics.median(b for _, b in spent),
        "ratio": statistics.median(b / a for a, b in spent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-model", help="a full-size architecture instead of the bundled model")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if args.random_model:
        name = args.random_model
        model = random_models.build(name)
        figures[f"{name}, 1 sample"] = beside_dense(model, [random_models.make_inputs(name, model)])
    else:
        model, processor = load_model("digit-scenes")
        samples = load_samples(assets.folder("calibration"), samples=64)
        for size in (1, 8, 16):
            batches = list(make_batches(samples, processor, batch_size=size))
            figures[f"bundled model, 64 samples in batches of {size}"] = beside_dense(model, batches)
        budgets = [checked_budget("flops_reduction", value / 10) for value in range(9, 0, -1)]
        started = time.perf_counter()
        fitter = Fitter(measure(model, batches))
        fitter.fit(checked_budget("flops_reduction", 0.65))
        first = time.perf_counter() - started
        nine = seconds_of(lambda: [fitter.fit(budget) for budget in budgets])
        recipes = [fitter.fit(checked_budget("flops_reduction", value)) for value in (0.6, 0.8)]
        blocks: list[Block] = [contextlib.nullcontext]
        blocks += [functools.partial(prune, model, recipe) for recipe in recipes]
        singles = list(make_batches(samples, processor))
        steps = decode_seconds(model, singles[0], blocks, steps=256, repeats=21)
        figures["a step of decoding over dense, 256 steps"] = dict(
            zip(("dense", "60%", "80%"), time_ratios(steps), strict=True)
        )
        model.set_attn_implementation("eager")
        authors = seconds_of(lambda: fit_sequential(model, singles, flops_reduction=0.65))
        figures["fits"] = {
            "measure and fit one budget": first,
            "nine more budgets": nine,
            "layer by layer, one budget": authors,
            "ratio": authors / first,
        }
    for name, row in figures.items():
        print(name)
        for what, value in row.items():
            print(f"    {what:28} {value:.3f}")
    print(json.dumps({"device": device_name(model), "torch": torch.__version__, **figures}))


if __name__ == "__main__":
    main()
