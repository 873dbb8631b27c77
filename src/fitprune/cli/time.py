"""`fitprune time`: recipes and the dense model, timed in turn on this device."""

from __future__ import annotations

import argparse
import json

from fitprune._support import files
from fitprune.cli import options, parser


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "time", run, "time recipes against the dense model on this device, and say where the time goes",
        "fitprune time --random-model llava-1.5-7b --recipe llava-1.5-7b:60 --new-tokens 1 16",
    )  # fmt: skip
    options.add_timed_model(command)
    options.add_recipes(command)
    command.add_argument(
        "--flops-reduction", type=float, nargs="+", metavar="X", help="budgets to fit recipes to, from the statistics "
        "of the image of noise: good for speed, not for answers",
    )  # fmt: skip
    command.add_argument(
        "--max-removal-layers", type=parser.positive, metavar="K", help="of those recipes (default: as 'fitprune fit')"
    )
    command.add_argument(
        "--new-tokens", type=parser.positive, nargs="+", default=[1, 16], metavar="N",
        help="lengths of the answers to time, in tokens (default: 1 16)",
    )  # fmt: skip
    command.add_argument(
        "--batch-sizes",
        type=parser.positive,
        nargs="+",
        default=[1],
        metavar="N",
        help="prompts in a batch (default: 1)",
    )
    command.add_argument(
        "--rounds",
        type=parser.whole(1, 10_000),
        default=5,
        help="rounds that count, after one that does not (default: 5)",
    )
    command.add_argument("--profile", help="made by 'fitprune profile' on this device (default: it is measured)")
    options.add_output(command, "JSON to write, also printed as the last line")
    return command


def run(args: options.Args) -> None:
    """Time, print a table and JSON, and write the JSON."""
    from fitprune.calibration.measure import measure
    from fitprune.costs.latency import LatencyProfile
    from fitprune.fitting.budget import checked_budget
    from fitprune.fitting.fit import Fitter
    from fitprune.speed.time_recipes import time_recipes
    from fitprune.speed.timings import as_json, table

    if args.output is not None:
        files.claim(args.output, files.TIMES, overwrite=args.overwrite)
    recipes = options.read_recipes(args.recipe)
    budgets = [checked_budget("flops_reduction", value) for value in args.flops_reduction or []]
    if not recipes and not budgets:
        raise ValueError("nothing to compare with dense: pass --recipe or --flops-reduction")
    profile = None if args.profile is None else LatencyProfile.load(args.profile)
    if profile is not None and args.batch_sizes != [profile.batch]:
        raise ValueError(
            f"--profile is of batches of {profile.batch}: pass --batch-sizes {profile.batch}, or leave it out"
        )
    model, make_inputs = options.timed_model(args)
    if budgets:
        fitter = Fitter(measure(model, [make_inputs(1)]))
        for budget in budgets:
            recipes[f"{100 * budget.value:g}%"] = fitter.fit(budget, args.max_removal_layers)
    timings = []
    for size in args.batch_sizes:
        inputs = make_inputs(size)
        timings += time_recipes(
            model, inputs, recipes, new_tokens=args.new_tokens, rounds=args.rounds, profile=profile, progress=True
        )
    document = as_json(timings, model)
    if args.output is not None:
        files.write_json(args.output, document)
    print(table(timings))
    print(json.dumps(document))
