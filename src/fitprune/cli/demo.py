"""`fitprune demo`: from calibration images to a page to look at, on the bundled model and real handwritten digits."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import assets, files
from fitprune.cli import options

if TYPE_CHECKING:
    from fitprune._support.journal import Record
    from fitprune.calibration.samples import Sample
    from fitprune.pictures.example import Example
    from fitprune.recipes.recipe import PruningRecipe

PICTURED = 4  # test samples whose tokens can be watched


@dataclasses.dataclass(frozen=True)
class _Size:
    """How much a demo does.

    Attributes:
        budgets: fractions of the visual FLOPs to remove.
        family: of bundled data.
        calibration: samples to measure; None for all.
        test: questions; None for all.
        batch_size: of the test.
    """

    budgets: tuple[float, ...]
    family: str
    calibration: int | None
    test: int | None
    batch_size: int


FULL = _Size((0.4, 0.6, 0.8, 0.9), "digit-scenes", None, None, 32)
QUICK = _Size((0.6, 0.8), "digit-details", 16, 64, 8)  # details are what pruning loses first


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "demo", run, "measure, fit and evaluate the bundled model, and make a page to look at",
        "fitprune demo --quick",
    )  # fmt: skip
    command.add_argument("--quick", action="store_true", help="fewer samples and budgets: under a minute")
    options.add_output(command, "folder for what it makes (default: demo-output)", default="demo-output")
    return command


def run(args: options.Args) -> None:
    """Run the demo."""
    demo(Path(args.output), quick=args.quick, overwrite=args.overwrite)


def demo(output: Path, *, quick: bool = False, overwrite: bool = False) -> None:
    """Measure, fit and evaluate the bundled model, printing each step; files go to `output`.

    Args:
        output: folder for statistics, recipes, results and the page; its path is the last line that is printed.
        quick: fewer samples and budgets.
        overwrite: replace files of other kinds too.

    Raises:
        OSError: `output` cannot be written, or holds files of other kinds under the demo's names.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.measure import measure
    from fitprune.calibration.samples import load_samples
    from fitprune.evaluation.demo_page import demo_page
    from fitprune.evaluation.evaluate import evaluate
    from fitprune.evaluation.results import kind_table, table
    from fitprune.families.adapter import adapt
    from fitprune.fitting.budget import checked_budget
    from fitprune.fitting.fit import Fitter

    size = QUICK if quick else FULL
    recipe_files = {budget: output / f"recipe-{round(100 * budget)}.json" for budget in size.budgets}
    page = output / "index.html"
    kinds = {output / "stats.safetensors": files.STATISTICS, output / "results.json": files.RESULTS}
    kinds |= dict.fromkeys(recipe_files.values(), files.RECIPE)
    kinds |= {output / "results.timings.json": files.RESULT_TIMES, page: files.PICTURE}
    for path, kind in kinds.items():
        files.claim(path, kind, overwrite=overwrite)
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

    calibration = load_samples(assets.folder("calibration", size.family), samples=size.calibration)
    stats = measure(model, make_batches(calibration, processor, batch_size=16))
    stats.save(output / "stats.safetensors")
    fitter = Fitter(stats)
    say(f"measured {fitter.visual_tokens} visual tokens on {len(stats)} questions -> {output / 'stats.safetensors'}")

    recipes: dict[str, PruningRecipe] = {}
    for budget in size.budgets:
        name = f"{round(100 * budget)}%"
        recipes[name] = fitter.fit(checked_budget("flops_reduction", budget))
        recipes[name].save(recipe_files[budget])
        say(f"fitted {name}: removed per layer {recipes[name].counts(fitter.visual_tokens)}")

    test = load_samples(assets.folder("test", size.family), samples=size.test)
    results = evaluate(model, processor, test, recipes, batch_size=size.batch_size, progress=True)
    results.save(output / "results.json")
    say(f"evaluated {len(test)} questions on digits that training never saw -> {output / 'results.json'}")
    print()
    print(table(results))
    print()
    if not quick:
        print(kind_table(results))
    examples = _examples(model, processor, recipes, test, results.answers)
    files.write_text(page, demo_page(results, recipes, fitter.visual_tokens, examples))
    say("a page to look at, in any browser:")
    print(page.resolve())


def _examples(
    model: Any,
    processor: Any,
    recipes: Mapping[str, PruningRecipe],
    test: Sequence[Sample],
    records: Sequence[Record],
) -> list[Example]:
    """Watch some test samples at 60%: of different kinds, some of which are answered otherwise at a higher budget."""
    from fitprune.pictures.example import example_of

    changed = [place for place, record in enumerate(records) if len(set(record["said"].values())) > 1]
    chosen: dict[str, int] = {}
    for place in [*changed[: PICTURED // 2], *range(len(records))]:
        chosen.setdefault(records[place]["kind"], place)
    return [
        example_of(model, processor, recipes["60%"], test[place], _answers(records[place]))
        for place in [*chosen.values()][:PICTURED]
    ]


def _answers(record: Record) -> dict[str, str]:
    """Give all answers to a question, the accepted one first."""
    return {"accepted": " / ".join(record["accepted"]), **record["said"]}
