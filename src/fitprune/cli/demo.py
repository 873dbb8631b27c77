"""`fitprune demo`: from calibration images to a table, on the bundled model and its real handwritten digits."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fitprune._support import assets, files
from fitprune.cli import options

if TYPE_CHECKING:
    from fitprune.calibration.samples import Sample
    from fitprune.recipes.recipe import PruningRecipe

BUDGETS = (0.4, 0.6, 0.8, 0.9)
PICTURED = (0, 1, 6, 7)  # test samples with different kinds of question


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "demo", run, "measure, fit and evaluate the bundled model: the whole way in one command",
        "fitprune demo --quick",
    )  # fmt: skip
    command.add_argument("--quick", action="store_true", help="fewer samples and budgets, no pictures: under a minute")
    options.add_output(command, "folder for what it makes (default: demo-output)", default="demo-output")
    return command


def run(args: options.Args) -> None:
    """Run the demo."""
    demo(Path(args.output), quick=args.quick, overwrite=args.overwrite)


def demo(output: Path, *, quick: bool = False, overwrite: bool = False) -> None:
    """Measure, fit and evaluate the bundled model, printing each step; files go to `output`.

    Args:
        output: folder for statistics, recipes, results and pictures.
        quick: 16 calibration and 64 test questions, one budget, no pictures.
        overwrite: replace files of other kinds too.

    Raises:
        OSError: `output` cannot be written, or holds files of other kinds under the demo's names.
        ImportError: matplotlib is missing, and not `quick`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    from fitprune._support.plots import require_matplotlib
    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.measure import measure
    from fitprune.calibration.samples import load_samples
    from fitprune.evaluation.evaluate import evaluate
    from fitprune.evaluation.results import kind_table, table
    from fitprune.families.adapter import adapt
    from fitprune.fitting.budget import checked_budget
    from fitprune.fitting.fit import Fitter

    budgets = (0.6,) if quick else BUDGETS
    recipe_files = {budget: output / f"recipe-{round(100 * budget)}.json" for budget in budgets}
    kinds = {output / "stats.safetensors": files.STATISTICS, output / "results.json": files.RESULTS}
    kinds |= dict.fromkeys(recipe_files.values(), files.RECIPE)
    kinds |= {output / "results.timings.json": files.RESULT_TIMES}
    kinds |= {output / f"{name}.png": files.IMAGE for name in (() if quick else ("kept_tokens", "keep_curves"))}
    for path, kind in kinds.items():
        files.claim(path, kind, overwrite=overwrite)
    if not quick:
        require_matplotlib("use --quick")
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    source = assets.folder("model")
    model = AutoModelForImageTextToText.from_pretrained(source).eval()
    model.name_or_path = assets.MODEL
    processor = AutoProcessor.from_pretrained(source)
    decoder = adapt(model).fingerprint.decoder
    say(f"model: {model.config.model_type}, {decoder.layers} decoder layers of width {decoder.hidden}")

    calibration = load_samples(assets.folder("calibration"), samples=16 if quick else None)
    stats = measure(model, make_batches(calibration, processor, batch_size=16))
    stats.save(output / "stats.safetensors")
    fitter = Fitter(stats)
    say(f"measured {fitter.visual_tokens} visual tokens on {len(stats)} questions -> {output / 'stats.safetensors'}")

    recipes: dict[str, PruningRecipe] = {}
    for budget in budgets:
        name = f"{round(100 * budget)}%"
        recipes[name] = fitter.fit(checked_budget("flops_reduction", budget))
        recipes[name].save(recipe_files[budget])
        say(f"fitted {name}: removed per layer {recipes[name].counts(fitter.visual_tokens)}")

    test = load_samples(assets.folder("test"), samples=64 if quick else None)
    results = evaluate(model, processor, test, recipes, batch_size=32, progress=True)
    results.save(output / "results.json")
    say(f"evaluated {len(test)} questions on digits that training never saw -> {output / 'results.json'}")
    print()
    print(table(results))
    print()
    if not quick:
        print(kind_table(results))
        _draw(output, model, processor, test, recipes)
        say(f"pictures: {output / 'kept_tokens.png'}, {output / 'keep_curves.png'}")


def _draw(
    output: Path, model: object, processor: object, test: list[Sample], recipes: dict[str, PruningRecipe]
) -> None:
    """Draw the keep curves, and on four test images the tokens that stay at 60%."""
    import torch

    from fitprune.calibration.batches import make_batches
    from fitprune.engine.prune import kept_positions
    from fitprune.evaluation.figures import draw_keep_curves, draw_kept_tokens
    from fitprune.families.adapter import adapt
    from fitprune.families.images import visual_mask

    draw_keep_curves(recipes, output / "keep_curves.png")
    adapted = adapt(model)
    examples = []
    for sample in (test[i] for i in PICTURED):
        inputs = next(make_batches([sample], processor))
        visual = torch.nonzero(visual_mask(adapted, inputs["input_ids"])[0])[:, 0]
        entered = kept_positions(model, recipes["60%"], inputs)
        present = [torch.isin(visual, positions[0]) for positions in entered]
        examples.append((sample.load_image(), f"{sample.text} {sample.answers[0]}", present))
    layers = range(1, adapted.fingerprint.decoder.layers)
    draw_kept_tokens(examples, layers, output / "kept_tokens.png")
