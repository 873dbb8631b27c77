"""`fitprune search`: recipes for budgets by what the model answers on calibration data; chooses the scorer too."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

from fitprune._support import files
from fitprune._support.text_tables import plural
from fitprune.cli import options, parser
from fitprune.cli.outputs import RecipeFiles, has_records


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "search", run, "search recipes that change the model's answers least",
        "fitprune search digit-scenes --stats stats.safetensors --data digit-scenes/calibration \\\n"
        "    --flops-reduction 0.8 -o best-80.json",
        _resumable,
    )  # fmt: skip
    options.add_model(command)
    command.add_argument("--stats", required=True, help="statistics of MODEL, made by 'fitprune measure'")
    options.add_data(command)
    options.add_budgets(command, latency=False)
    options.add_output(
        command, "recipe file; a folder for several budgets. An interrupted search goes on from the file beside it",
        required=True,
    )  # fmt: skip
    command.add_argument("--batch-size", type=parser.positive, default=8, help="samples in a batch (default: 8)")
    command.add_argument(
        "--max-new-tokens", type=parser.positive, default=16, help="tokens of an answer that are compared (default: 16)"
    )
    command.add_argument(
        "--recombine", type=parser.whole(1, 1000), metavar="N", help="questions asked of each image: its own and other "
        "samples' (default: 4, or 2 for several budgets)",
    )  # fmt: skip
    command.add_argument("--minutes", type=float, help="time limit in minutes (default: none)")
    command.add_argument(
        "--passes", type=float, help="dense passes over the data to search for (default: 36, or 76 for several budgets)"
    )
    return command


def _resumable(args: options.Args) -> bool:
    return has_records(RecipeFiles.of(args).journal)


def run(args: options.Args) -> None:
    """Search, and write the recipes; goes on from the journal of a run that was killed."""
    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.samples import recombined
    from fitprune.fitting.fit import Fitter
    from fitprune.fitting.stats import AttentionStats
    from fitprune.output_search.search import Searcher

    budgets = options.read_budgets(args)
    outputs = RecipeFiles.of(args)
    stats = AttentionStats.load(args.stats)
    replaced = outputs.claim(overwrite=args.overwrite)
    files.require_writable(outputs.journal)
    samples = options.joined(options.read_samples(args))
    random.Random(args.seed).shuffle(samples)  # both halves get samples of all tasks and kinds
    _require_halves(samples)
    for name in ("passes", "minutes"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} {value}: must be above 0, and finite")
    # A budget out of reach and a bad image are found before the model is loaded.
    fitter = Fitter(stats, visual_tokens=args.visual_tokens)
    for budget in budgets:
        fitter.fit(budget)
    for sample in samples:
        sample.load_image()
    model, processor = options.load(args)
    samples = options.usable(args, samples, processor, model)
    _require_halves(samples)
    times = args.recombine or (4 if len(budgets) == 1 else 2)
    middle = -(-len(samples) // 2)
    search, validation = (
        make_batches(
            recombined(half, times, seed=args.seed),
            processor,
            batch_size=args.batch_size,
            prompt_template=args.prompt_template,
            model=model,
        )
        for half in (samples[:middle], samples[middle:])
    )
    searcher = Searcher(
        model,
        search,
        stats,
        validation=validation,
        unit=len(samples),
        visual_tokens=args.visual_tokens,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        journal=outputs.journal,
        progress=True,
    )
    recipes = searcher.fit(budgets, passes=args.passes, minutes=args.minutes)
    print(f"searched in {searcher.passes:.1f} dense passes over {plural(len(samples), 'sample')}")
    outputs.save(recipes, replaced)
    outputs.journal.unlink(missing_ok=True)


def _require_halves(samples: Sequence[Any]) -> None:
    if len(samples) < 2:
        raise ValueError("--data holds 1 sample: half is searched on and half validates, so at least 2 are needed")
