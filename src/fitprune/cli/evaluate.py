"""`fitprune evaluate`: recipes and published methods against the dense model, on questions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import files
from fitprune.cli import options, parser
from fitprune.cli.outputs import has_records
from fitprune.evaluation.metrics import METRICS
from fitprune.recipes.recipe import PruningRecipe

if TYPE_CHECKING:
    from fitprune.calibration.samples import Sample

SIZED = 32  # samples that tell the usual number of visual tokens


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "evaluate", run, "compare recipes and published methods with the dense model on questions",
        "fitprune evaluate digit-scenes --data digit-scenes/test --methods all \\\n"
        "    --flops-reduction 0.4 0.6 0.8 --stats stats.safetensors -o results.json",
        _resumable,
    )  # fmt: skip
    options.add_model(command)
    options.add_data(command, required=False)
    options.add_benchmarks(command)
    options.add_recipes(command)
    options.add_force(command)
    command.add_argument(
        "--methods", nargs="+", help="methods solved for each budget: all, or names such as fitprune random fastv:k=1 "
        "(docs/baselines.md; default: fitprune)",
    )  # fmt: skip
    command.add_argument(
        "--flops-reduction", type=float, nargs="+", metavar="X",
        help="budgets: fractions of the visual tokens' FLOPs to remove",
    )  # fmt: skip
    command.add_argument(
        "--stats", help="made by 'fitprune measure'; needed for methods whose counts are fitted: fitprune, random, all"
    )
    command.add_argument(
        "--visual-tokens", type=parser.positive, help="image size that methods meet budgets for (default: the most "
        f"common one in --stats; without --stats, in the first {SIZED} samples)",
    )  # fmt: skip
    command.add_argument(
        "--seeds",
        type=parser.seed,
        nargs="+",
        default=[0, 1, 2],
        help="of methods that draw at random (default: 0 1 2)",
    )
    options.add_output(
        command, "results file to write; each sample's answers go beside it, and a run that was killed goes on from "
        "them", required=True,
    )  # fmt: skip
    command.add_argument("--batch-size", type=parser.positive, default=8, help="questions in a batch (default: 8)")
    command.add_argument(
        "--max-new-tokens",
        type=parser.positive,
        help="most tokens of an answer (default: the benchmark's; 16 for --data)",
    )
    command.add_argument(
        "--metric", choices=METRICS, help="how answers are judged, in every task (default: by the data: vqa for ten "
        "annotators' answers, else normalized)",
    )  # fmt: skip
    command.add_argument(
        "--timed-batches", type=parser.whole(0), default=1, help="batches of each task to time; 0 for none (default: 1)"
    )
    command.add_argument(
        "--examples", type=parser.whole(0), default=8, help="samples kept with picture and kept tokens (default: 8)"
    )
    return command


def _resumable(args: options.Args) -> bool:
    out = Path(args.output)
    return any(map(has_records, out.parent.glob(f"{out.name.removesuffix('.json')}.samples.jsonl*")))


def run(args: options.Args) -> None:
    """Evaluate, write the results, and print a table."""
    from fitprune.evaluation.answer_files import require_places, write_all
    from fitprune.evaluation.entries import Entry
    from fitprune.evaluation.evaluate import evaluate
    from fitprune.evaluation.results import beside, table
    from fitprune.families.adapter import adapt
    from fitprune.recipes.find import fitted_to

    replaced = files.claim(args.output, files.RESULTS, overwrite=args.overwrite)
    files.claim(beside(args.output, "timings.json"), files.RESULT_TIMES, overwrite=args.overwrite)
    _require_use(args)
    recipes = options.read_recipes(args.recipe)
    names, left_out = _method_names(args)
    solved = _solved_by_statistics(args, names) if names and args.stats else None
    at = {name: _searched_budget(recipe) for name, recipe in recipes.items()}
    budgets = [budget for budget in at.values() if budget is not None]
    # Recipes of one search stand in one line of the tables, beside the methods at their budgets.
    together = len(set(budgets)) == len(budgets)
    tasks, benchmarks = options.read_samples(args), options.read_benchmarks(args)
    for benchmark, _ in benchmarks:
        if benchmark.name in tasks:
            raise ValueError(
                f"--data {benchmark.name}: is also a benchmark's name; write ./{benchmark.name}, or rename it"
            )
        require_places(benchmark, beside(args.output, "answers"))
    model, processor = options.load(args)
    tasks = {name: options.usable(args, samples, processor, model) for name, samples in tasks.items()}
    tasks |= {benchmark.name: samples for benchmark, samples in benchmarks}
    if solved is None:
        solved = _solved_by_sizes(args, names, model, processor, tasks) if names else ([], [])
    fingerprint = adapt(model).fingerprint
    entries = []
    for name, recipe in recipes.items():
        recipe = fitted_to(recipe, fingerprint, force=args.force, what=f"recipe {name!r}")
        alone = at[name] is None or not together
        entries.append(Entry(name, recipe) if alone else Entry("output", recipe, at[name]))
    results = evaluate(
        model,
        processor,
        tasks,
        entries + solved[0],
        journal=beside(args.output, "samples.jsonl"),
        skipped=left_out + solved[1],
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        prompt_template=args.prompt_template,
        benchmarks={benchmark.name: benchmark for benchmark, _ in benchmarks},
        protocol=args.protocol,
        metric=args.metric,
        timed_batches=args.timed_batches,
        examples=args.examples,
        progress=True,
    )
    if results.rows:  # one of several processes has them
        results.save(args.output)
        print(table(results))
        for benchmark, samples in benchmarks:
            print(write_all(results, benchmark, samples, beside(args.output, "answers")))
        if replaced:
            print(f"{args.output}{replaced}")


def _require_use(args: options.Args) -> None:
    """Refuse options that would change nothing, and a run without questions."""
    if not args.data and not args.benchmark:
        raise ValueError("no questions: pass --benchmark, such as --benchmark textvqa, or --data")
    if args.protocol and not args.benchmark:
        raise ValueError(f"--protocol {args.protocol}: is for --benchmark; --data takes --prompt-template")
    if args.protocol and args.prompt_template:
        raise ValueError(f"--protocol {args.protocol}: --prompt-template takes its place; leave one out")
    for option, value in (
        ("--metric", args.metric),
        ("--image-folder", args.image_folder),
        ("--skip-bad", args.skip_bad),
    ):
        if value and not args.data:
            raise ValueError(
                f"{option}: is for --data; a benchmark has its own metric and files, all of which it needs"
            )


def _searched_budget(recipe: PruningRecipe) -> float | None:
    """Give the FLOPs budget of a recipe of `fitprune search`; None for other recipes."""
    budget = recipe.provenance.get("budget") if recipe.provenance.get("source") == "fitprune.fit_output" else None
    value = budget.get("flops_reduction") if isinstance(budget, dict) else None
    return value if isinstance(value, float) and 0 <= value < 1 else None


def _method_names(args: options.Args) -> tuple[list[str], list[dict[str, Any]]]:
    """Check --methods, --flops-reduction and --seeds before the model is loaded; empty where no method is asked for.

    Also gives the methods of "all" that cannot be used, for each budget with the reason.
    """
    from fitprune.baselines.table import BASELINES, parse_name
    from fitprune.fitting.budget import checked_budget

    if not args.methods and not args.flops_reduction:
        return [], []
    if not args.flops_reduction:
        raise ValueError("--methods are solved for budgets: --flops-reduction is missing")
    broken = {}
    for name in BASELINES if "all" in (args.methods or []) else ():
        try:
            BASELINES[name]
        except ValueError as error:  # of an installed package
            broken[name] = str(error)
    every = [name for name in BASELINES if name not in broken]
    names = [name for each in args.methods or ["fitprune"] for name in (every if each == "all" else [each])]
    options.require_different("--seeds", args.seeds)
    options.require_different("--methods", names)
    options.require_different("--flops-reduction", args.flops_reduction)
    for budget in args.flops_reduction:
        checked_budget("flops_reduction", budget)
    fitted = [name for name in names if BASELINES[parse_name(name)[0]].needs_statistics]
    if fitted and not args.stats:
        raise ValueError(
            f"method {fitted[0]} is fitted from statistics: --stats is missing; make it by 'fitprune measure', or name "
            f"no method that is ({', '.join(fitted)})"
        )
    budgets = args.flops_reduction
    return names, [{"method": name, "budget": at, "reason": why} for name, why in broken.items() for at in budgets]


def _solved_by_statistics(args: options.Args, names: Sequence[str]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Solve the methods; also gives those that cannot meet a budget."""
    from fitprune.evaluation.entries import entries_for
    from fitprune.fitting.fit import Fitter
    from fitprune.fitting.stats import AttentionStats

    fitter = Fitter(AttentionStats.load(args.stats), visual_tokens=args.visual_tokens)
    return entries_for(names, fitter, args.flops_reduction, args.seeds)


def _solved_by_sizes(
    args: options.Args, names: Sequence[str], model: Any, processor: Any, tasks: Mapping[str, list[Sample]]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Solve the methods for the model's sizes and the usual image of the data."""
    from fitprune.baselines.base import Sizes
    from fitprune.evaluation.entries import entries_for
    from fitprune.families.adapter import adapt

    adapted = adapt(model)
    visual_tokens = args.visual_tokens or _usual_visual_tokens(args, adapted, processor, options.joined(tasks))
    return entries_for(names, Sizes(adapted.fingerprint, visual_tokens), args.flops_reduction, args.seeds)


def _usual_visual_tokens(args: options.Args, adapted: Any, processor: Any, samples: Sequence[Sample]) -> int:
    """Find the most common number of visual tokens, the larger of two equally common, as statistics do."""
    from collections import Counter

    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.protocol import protocol_for
    from fitprune.families.images import visual_mask

    with_image = [sample for sample in samples if sample.image is not None][:SIZED]
    if not with_image:
        raise ValueError("no question has an image, so that nothing is pruned: --methods would all be the dense model")
    chosen = None if args.data or args.prompt_template else protocol_for(args.protocol, processor, adapted.model)
    how = {"prompt_template": args.prompt_template, "model": adapted.model, "protocol": chosen}
    batches = make_batches(with_image, processor, **how)
    counts = Counter(int(visual_mask(adapted, batch["input_ids"]).sum()) for batch in batches)
    return max(counts, key=lambda count: (counts[count], count))
