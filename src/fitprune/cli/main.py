"""The `fitprune` command. Parses, calls, prints; torch is imported only by the command that needs it.

Exit codes: 0 done, 2 bad use, 1 failure; errors are one line, `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fitprune._support import assets, files
from fitprune._support.text_tables import plural, scaled
from fitprune._version import __version__
from fitprune.costs.sizes import MOST_TOKENS
from fitprune.evaluation.metrics import METRICS
from fitprune.recipes.recipe import PruningRecipe

LONGEST_MESSAGE = 600  # characters of an error; what is longer quotes a file, and is cut in the middle


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="fitprune: %(message)s")
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        more = "; run the same command again to go on" if _stored(args) else ""
        print(f"fitprune: interrupted{more}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
        if args.debug:
            raise
        number = f"[Errno {error.errno}] " if isinstance(error, OSError) else ""
        message = " ".join(str(error).removeprefix(number).split()) or type(error).__name__
        print(f"fitprune: error: {_shortened(message)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _shortened(message: str) -> str:
    half = LONGEST_MESSAGE // 2
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def _stored(args: argparse.Namespace) -> bool:
    """Whether the command, cut off now, left something that the same command goes on from."""
    out = getattr(args, "output", None) or ""
    if args.run is _measure:
        return any(Path(f"{out}.parts").glob("*.safetensors"))
    if args.run is _convert_llava_hr:
        return any(Path(args.destination).glob("*.safetensors"))
    journals = []
    if args.run is _evaluate:
        journals = list(Path(out).parent.glob(f"{Path(out).name.removesuffix('.json')}.samples.jsonl*"))
    elif args.run is _fit:
        journals = [_search_journal(args, one_file) for one_file in (True, False)]
    for journal in journals:
        if journal.is_file():
            with journal.open("rb") as file:
                if len(file.readlines(1 << 20)) > 1:  # the first line says what run it is
                    return True
    return False


def _measure(args: argparse.Namespace) -> None:
    from fitprune._support.processes import Processes
    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.measure import forget_parts, measure

    replaced = files.claim(args.output, files.STATISTICS, overwrite=args.overwrite)
    # Before the model: bad data is found in seconds.
    samples = [sample for task in _samples(args).values() for sample in task]
    model, processor = _load(args)
    samples = _usable(args, samples, processor, model)
    processes = Processes()
    batches = make_batches(
        samples,
        processor,
        batch_size=args.batch_size,
        prompt_template=args.prompt_template,
        processes=processes,
        model=model,
    )
    total = -(-len(samples) // args.batch_size)
    stats = measure(model, batches, parts=f"{args.output}.parts", total=total, progress=True)
    if processes.rank > 0:
        return
    stats.save(args.output)
    forget_parts(f"{args.output}.parts")
    print(f"{args.output}: {plural(len(stats), 'sample')}, {stats.model.decoder.layers} layers{replaced}")


def _fit(args: argparse.Namespace) -> None:
    from fitprune.costs.latency import LatencyProfile
    from fitprune.fitting.budget import checked_budget
    from fitprune.fitting.fit import Fitter
    from fitprune.fitting.stats import AttentionStats

    kind = next(
        k
        for k in (
            "flops_reduction",
            "kv_cache_reduction",
            "mean_visual_tokens",
            "tolerance",
            "prefill_latency_reduction",
        )
        if getattr(args, k)
    )
    profile = None if args.profile is None else LatencyProfile.load(args.profile)
    budgets = [checked_budget(kind, value, profile) for value in getattr(args, kind)]
    if len({budget.value for budget in budgets}) < len(budgets):
        raise ValueError(f"--{kind.replace('_', '-')} states a budget twice: each makes a file named by its value")
    _require_of_objective(args)
    meant = args.output.endswith(("/", "\\")) or args.output in (".", "..")  # as a folder, whatever is there
    folder = meant or Path(args.output).is_dir()
    if len(budgets) > 1 and not folder and args.output.endswith(".json"):
        raise ValueError(f"--output {args.output}: {len(budgets)} budgets make a file each: name a folder")
    one_file = len(budgets) == 1 and not folder
    paths = [Path(args.output) if one_file else Path(args.output) / f"{kind}-{budget.value}.json" for budget in budgets]
    stats = AttentionStats.load(args.stats)

    def claim() -> list[str]:
        if not one_file and not meant:
            remedy = f"write {args.output}/ to put recipes among them"
            files.claim_folder(args.output, _stands_among_recipes, remedy, overwrite=args.overwrite)
        return [files.claim(path, files.RECIPE, overwrite=args.overwrite) for path in paths]

    if args.objective == "output":
        replaced = claim()
        recipes = _fit_output(args, stats, budgets, one_file)
    else:
        fitter = Fitter(stats, visual_tokens=args.visual_tokens)
        # All before the first is written, and before a folder is made for them.
        recipes = [fitter.fit(budget, args.max_removal_layers) for budget in budgets]
        replaced = claim()
    for path, recipe, more in zip(paths, recipes, replaced, strict=True):
        recipe.save(path)
        cost = recipe.cost()
        print(
            f"{path}: visual FLOPs -{100 * cost.flops_reduction:.2f}%, "
            f"{cost.mean_visual_tokens:.1f} visual tokens a layer, {_quality(recipe)}{more}"
        )
    if args.objective == "output":
        _search_journal(args, one_file).unlink(missing_ok=True)


def _require_of_objective(args: argparse.Namespace) -> None:
    """Refuse options of the other objective."""
    names, why = ["max_removal_layers", "profile"], "attention: the search chooses layers by FLOPs"
    if args.objective == "attention":
        names = ["model", "data", "minutes", "passes", "recombine"]
        why = "output: the paper's rule needs the statistics alone"
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --objective {why}")


def _stands_among_recipes(entry: Path) -> bool:
    known = entry.name in ("README.md", "search.jsonl")
    return known or (entry.suffix == ".json" and files.kind_of(entry) == files.RECIPE)


def _quality(recipe: PruningRecipe) -> str:
    """What the fit says of a recipe: its tolerance, or its divergence beside that of the paper's rule."""
    if (found := recipe.provenance.get("divergence")) is None:
        merged = recipe.provenance.get("max_removal_layers") and (
            f", {len(recipe.removing)} layers remove, extra loss {recipe.provenance['extra_loss']:.4f}"
        )
        return f"tolerance {recipe.provenance['tolerance']:.4f}{merged or ''}"
    means = [f"{half} {of['found']:.4f} (paper's rule {of['paper']:.4f})" for half, of in found.items()]
    kept = "" if recipe.provenance["chosen"] == "found" else ": not better, so the paper's recipe"
    return f"divergence in nats: {', '.join(means)}{kept}"


def _search_journal(args: argparse.Namespace, one_file: bool) -> Path:
    return Path(f"{args.output}.search.jsonl") if one_file else Path(args.output) / "search.jsonl"


def _fit_output(args: argparse.Namespace, stats: Any, budgets: Sequence[Any], one_file: bool) -> list[PruningRecipe]:
    """Fit on what the model says; goes on from the journal of a run that was killed."""
    import random

    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.samples import recombined
    from fitprune.fitting.fit import Fitter
    from fitprune.output_search.search import Searcher

    missing = [name for name in ("model", "data") if getattr(args, name) is None]
    if missing:
        raise ValueError(f"--objective output asks the model about calibration data: --{missing[0]} is missing")
    journal = _search_journal(args, one_file)
    files.require_writable(journal)
    samples = [sample for task in _samples(args).values() for sample in task]
    random.Random(args.seed).shuffle(samples)  # both halves get samples of all tasks and kinds
    _require_halves(samples)
    for name in ("passes", "minutes"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} {value}: must be above 0, and finite")
    fitter = Fitter(stats, visual_tokens=args.visual_tokens)
    for budget in budgets:
        fitter.fit(budget)  # one out of reach is found before the model is loaded
    for sample in samples:
        sample.load_image()  # and so is a bad image
    model, processor = _load(args)
    samples = _usable(args, samples, processor, model)
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
        journal=journal,
        progress=True,
    )
    recipes = searcher.fit(budgets, passes=args.passes, minutes=args.minutes)
    print(f"searched in {searcher.passes:.1f} dense passes over {plural(len(samples), 'sample')}")
    return recipes


def _require_halves(samples: Sequence[Any]) -> None:
    if len(samples) < 2:
        raise ValueError("--data holds 1 sample: half is searched on and half validates, so at least 2 are needed")


def _cost(args: argparse.Namespace) -> None:
    recipe = PruningRecipe.named(args.recipe)
    cost = recipe.cost(
        visual_tokens=args.visual_tokens, text_tokens=args.text_tokens, crops=args.crops, value_bytes=args.value_bytes
    )

    def change(after: float, before: float, unit: str) -> str:
        return f"{scaled(after, unit)} against {scaled(before, unit)} dense ({100 * (after / before - 1):+.1f}%)"

    means = f"mean {cost.mean_visual_tokens:.1f} a layer, {cost.kept[-1]} at the end"
    print(f"visual tokens       {cost.visual_tokens}, {means}")
    before = recipe.counts_before(cost.visual_tokens)
    print(f"removed per layer   {' '.join(str(n) for n in recipe.counts(cost.visual_tokens))}")
    if any(before):
        print(f"before each layer   {' '.join(str(n) for n in before)}")
    print(f"visual FLOPs        -{100 * cost.flops_reduction:.2f}% (the paper's accounting: visual tokens alone)")
    print(
        f"prefill             {change(cost.prefill_flops, cost.dense_prefill_flops, 'FLOPs')}"
        f"{'' if recipe.model.vision else '; without the vision tower, which is not priced'}"
    )
    print(f"KV cache            {change(cost.kv_bytes, cost.dense_kv_bytes, 'B')}")
    if recipe.scorer["name"] != "fitprune":
        print(f"ranked by           {_scorer_name(recipe)}")


def _scorer_name(recipe: PruningRecipe) -> str:
    """The recipe's scorer, and whether this version knows it; looks into torch's part of the package."""
    from fitprune.scoring.scorers import get_scorer

    name = str(recipe.scorer["name"])[:60]
    try:
        get_scorer(recipe.scorer)
    except (ValueError, TypeError, ArithmeticError) as error:
        return f"{name}, which no model can be pruned by: {str(error)[:200]}"
    return name


def _profile(args: argparse.Namespace) -> None:
    from fitprune.speed.profiling import profile_latency

    replaced = files.claim(args.output, files.PROFILE, overwrite=args.overwrite)
    model, make_inputs = _timed_model(args)
    profile = profile_latency(model, make_inputs(args.batch_size), repeats=args.rounds, progress=True)
    profile.save(args.output)
    dense = profile.dense_seconds(profile.visual_tokens)
    print(
        f"{args.output}: {profile.device}, batches of {profile.batch}, {profile.visual_tokens} visual and "
        f"{profile.text_tokens} text tokens: dense prefill {dense:.3f} s{replaced}"
    )


def _recipes(given: Sequence[str]) -> dict[str, PruningRecipe]:
    """Load recipes by the names that tables show: a file's without its ending, a folder's, or the published one's."""
    found = {Path(name).name.removesuffix(".json") if Path(name).exists() else name: name for name in given}
    if len(found) < len(given):
        raise ValueError(f"--recipe {' '.join(given)}: two have the same name; rename one")
    if "dense" in found:
        raise ValueError(f"--recipe {found['dense']}: 'dense' names the model without a recipe; rename the file")
    return {name: PruningRecipe.named(source) for name, source in found.items()}


def _benchmark(args: argparse.Namespace) -> None:
    import json

    from fitprune.calibration.measure import measure
    from fitprune.costs.latency import LatencyProfile
    from fitprune.fitting.budget import checked_budget
    from fitprune.fitting.fit import Fitter
    from fitprune.speed.benchmark import time_recipes
    from fitprune.speed.timings import as_json, table

    if args.output is not None:
        files.claim(args.output, files.TIMES, overwrite=args.overwrite)
    recipes = _recipes(args.recipe or [])
    budgets = [checked_budget("flops_reduction", value) for value in args.flops_reduction or []]
    if not recipes and not budgets:
        raise ValueError("nothing to compare with dense: state --recipe or --flops-reduction")
    profile = None if args.profile is None else LatencyProfile.load(args.profile)
    if profile is not None and args.batch_sizes != [profile.batch]:
        raise ValueError(
            f"--profile is of batches of {profile.batch}: state --batch-sizes {profile.batch}, or leave it out"
        )
    model, make_inputs = _timed_model(args)
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


def _timed_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load MODEL, or build --shape; also gives what makes a batch of a size for it."""
    from fitprune.families.loading import DTYPES

    if (args.model is None) == (args.shape is None):
        raise ValueError("state MODEL or --shape, one of them")
    sizes = {"text_tokens": args.text_tokens}
    if args.shape is None:
        from fitprune.speed.benchmark import noise_inputs

        model, processor = _load(args)
        more = {"side": args.image_size, "prompt_template": args.prompt_template}
        return model, lambda size: noise_inputs(model, processor, batch_size=size, **sizes, **more)
    import torch

    from fitprune.speed import random_models

    random_models.get_model_row(args.shape)
    if args.dtype not in DTYPES or args.device_map is not None or args.quantization is not None:
        raise ValueError("--shape makes weights of --dtype on one --device: no --device-map, no --quantization")
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    model = random_models.build(args.shape, dtype=dtype, device=args.device or "cpu")
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    return model, lambda size: random_models.make_inputs(args.shape, model, batch=size, **sizes)


def _generate(args: argparse.Namespace) -> None:
    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.pictures import located
    from fitprune.calibration.prompts import format_prompt
    from fitprune.calibration.samples import Sample
    from fitprune.engine.prune import prune
    from fitprune.families.inputs import to_model

    recipe = None if args.recipe is None else PruningRecipe.named(args.recipe)
    sample = Sample("0", args.question, located(args.image, Path()), where="--image")
    sample.load_image()
    model, processor = _load(args)
    format_prompt(processor, args.question, args.prompt_template)  # whose fault is not that of --image
    inputs = to_model(next(make_batches([sample], processor, prompt_template=args.prompt_template, model=model)), model)
    with prune(model, recipe, force=args.force):
        ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip())


def _evaluate(args: argparse.Namespace) -> None:
    from fitprune.evaluation.entries import Entry
    from fitprune.evaluation.evaluate import evaluate
    from fitprune.evaluation.results import beside, table
    from fitprune.families.adapter import adapt
    from fitprune.recipes.find import fitted_to

    replaced = files.claim(args.output, files.RESULTS, overwrite=args.overwrite)
    files.claim(beside(args.output, "timings.json"), files.RESULT_TIMES, overwrite=args.overwrite)
    recipes = _recipes(args.recipe or [])
    solved, skipped = _solved(args)
    at = {name: _output_budget(recipe) for name, recipe in recipes.items()}
    budgets = [budget for budget in at.values() if budget is not None]
    # Recipes of one search stand in one line of the tables, beside the methods at their budgets.
    together = len(set(budgets)) == len(budgets)
    tasks = _samples(args)
    model, processor = _load(args)
    tasks = {name: _usable(args, samples, processor, model) for name, samples in tasks.items()}
    shape = adapt(model).fingerprint
    entries = []
    for name, recipe in recipes.items():
        recipe = fitted_to(recipe, shape, force=args.force, what=f"recipe {name!r}")
        alone = at[name] is None or not together
        entries.append(Entry(name, recipe) if alone else Entry("output", recipe, at[name]))
    entries += solved
    results = evaluate(
        model,
        processor,
        tasks,
        entries,
        journal=beside(args.output, "samples.jsonl"),
        skipped=skipped,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        prompt_template=args.prompt_template,
        metric=args.metric,
        timed_batches=args.timed_batches,
        examples=args.examples,
        progress=True,
    )
    if results.rows:  # one of several processes has them
        results.save(args.output)
        print(table(results))
        if replaced:
            print(f"{args.output}{replaced}")


def _output_budget(recipe: PruningRecipe) -> float | None:
    """The FLOPs budget of a recipe that was fitted on what the model says; None for other recipes."""
    budget = recipe.provenance.get("budget") if recipe.provenance.get("source") == "fitprune.fit_output" else None
    value = budget.get("flops_reduction") if isinstance(budget, dict) else None
    return value if isinstance(value, float) and 0 <= value < 1 else None


def _solved(args: argparse.Namespace) -> tuple[list[Any], list[dict[str, Any]]]:
    """Solve --methods for --flops-reduction; also says what cannot be solved."""
    from fitprune.baselines.table import BASELINES
    from fitprune.evaluation.entries import entries_for
    from fitprune.fitting.fit import Fitter
    from fitprune.fitting.stats import AttentionStats

    if not args.methods and not args.flops_reduction:
        return [], []
    if not args.flops_reduction or not args.stats:
        missing = "--flops-reduction" if not args.flops_reduction else "--stats"
        raise ValueError(f"--methods are solved for budgets from statistics: {missing} is missing")
    names = [n for name in args.methods or ["fitprune"] for n in (BASELINES if name == "all" else [name])]
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: must be different")
    if len(set(names)) < len(names) or len(set(args.flops_reduction)) < len(args.flops_reduction):
        raise ValueError(f"--methods {' '.join(names)} --flops-reduction {args.flops_reduction}: one stands twice")
    return entries_for(names, Fitter(AttentionStats.load(args.stats)), args.flops_reduction, args.seeds)


def _report(args: argparse.Namespace) -> None:
    from fitprune._support.plots import require_matplotlib
    from fitprune.evaluation.report import write_report
    from fitprune.evaluation.results import Results

    replaced = files.claim(args.output, files.REPORT, overwrite=args.overwrite)
    results = Results.load(args.results)
    require_matplotlib()
    write_report(results, args.output)
    print(f"{args.output}{replaced}")


def _analyze(args: argparse.Namespace) -> None:
    from fitprune._support.plots import require_matplotlib
    from fitprune.analysis.analyze import analyze
    from fitprune.analysis.figures import draw_analysis
    from fitprune.analysis.save import NAME, findings, save
    from fitprune.fitting.stats import AttentionStats

    files.claim_folder(args.output, _is_analysis, "name another folder", overwrite=args.overwrite)
    replaced = files.claim(Path(args.output) / NAME, files.ANALYSIS, overwrite=args.overwrite)
    if not args.no_pictures:
        require_matplotlib("use --no-pictures")
    if len({Path(name).stem for name in args.stats}) < len(args.stats):
        raise ValueError(f"STATS {' '.join(args.stats)}: two files have the same name; rename one")
    stats = {Path(name).stem: AttentionStats.load(name) for name in args.stats}
    analysis = analyze(stats, budgets=args.flops_reduction, resamples=args.resamples, seed=args.seed)
    written = save(analysis, args.output)
    if not args.no_pictures:
        written += draw_analysis(analysis, args.output)
    print(findings(analysis))
    print(f"{args.output}: {len(written)} files, of which {NAME} holds all figures{replaced}")


def _is_analysis(entry: Path) -> bool:
    """Whether an entry of a folder is of an earlier analysis: beside its JSON, its tables and pictures."""
    from fitprune.analysis.save import NAME

    whole = entry.with_name(NAME)
    return entry.suffix in (".csv", ".png", ".svg", ".json") and files.kind_of(whole) == files.ANALYSIS


def _families(args: argparse.Namespace) -> None:
    from fitprune.families.table import table

    print(table())


def _convert_llava_hr(args: argparse.Namespace) -> None:
    from fitprune.families.llava_hr.conversion import convert

    done = convert(args.source, args.destination)
    print(f"{done}: now 'fitprune generate {done} --recipe llava-hr-7b:60 --image IMAGE --question QUESTION'")


def _demo(args: argparse.Namespace) -> None:
    from fitprune.cli.demo import demo

    demo(Path(args.output), quick=args.quick, overwrite=args.overwrite)


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load model and processor as the options of `add_model` say."""
    from transformers.utils import logging as transformers_logging

    from fitprune.families.loading import load_model

    transformers_logging.disable_progress_bar()
    return load_model(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        device_map=args.device_map,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        quantization=args.quantization,
    )


def _samples(args: argparse.Namespace) -> dict[str, Any]:
    """Read every --data: its name -> its samples."""
    from fitprune.calibration.samples import load_samples

    if len(set(args.data)) < len(args.data):
        raise ValueError(f"--data {' '.join(args.data)}: one stands twice")
    options = {"samples": args.samples, "seed": args.seed, "skip_bad": args.skip_bad}
    return {name: load_samples(name, args.image_folder, **options) for name in args.data}


def _usable(args: argparse.Namespace, samples: list[Any], processor: Any, model: Any) -> list[Any]:
    """With --skip-bad, leave out what the processor refuses; without, it is named when its batch comes."""
    from fitprune.calibration.batches import usable

    if not args.skip_bad:
        return samples
    return usable(samples, processor, prompt_template=args.prompt_template, model=model)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fitprune",
        description="Fit a visual-token pruning recipe for a multimodal LLM to a budget, and use it. No training.",
        epilog="example: fitprune demo --quick",
    )
    parser.add_argument("--version", action="version", version=f"fitprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help_text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        made.set_defaults(run=run)
        return made

    def add_model(made: argparse._ActionsContainer, name: str = "model", **options: Any) -> None:
        made.add_argument(
            name, metavar="MODEL", help="folder or hub name; 'digit-scenes' is the embedded model", **options
        )
        made.add_argument("--revision", help="branch, tag or commit of MODEL on the hub (default: main)")
        made.add_argument(
            "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
            help="default: the checkpoint's",
        )  # fmt: skip
        where = made.add_mutually_exclusive_group()
        where.add_argument("--device", help="for example cpu, cuda, cuda:1 (default: cpu)")
        where.add_argument("--device-map", help="spread MODEL over devices: auto, balanced, sequential")
        made.add_argument("--attn-implementation", help="such as sdpa, eager, flash_attention_2")
        made.add_argument(
            "--quantization", choices=["bnb-4bit", "bnb-8bit", "torchao-int8"],
            help="quantize the weights while loading (docs/quantization.md)",
        )  # fmt: skip
        made.add_argument("--trust-remote-code", action="store_true", help="run code that MODEL's repository brings")
        made.add_argument(
            "--prompt-template", type=_template, help="instead of the chat template, with \\n for a new line and \\t "
            "for a tab: 'USER: <image>\\n{question} ASSISTANT:'",
        )  # fmt: skip

    recipe_names = "recipe file or folder, hub name, or a published one such as llava-1.5-7b:60"

    def add_force(made: argparse.ArgumentParser) -> None:
        made.add_argument("--force", action="store_true", help="use a recipe of another model with as many layers")

    def add_output(made: argparse.ArgumentParser, help_text: str, **options: Any) -> None:
        made.add_argument("-o", "--output", type=_path, help=help_text, **options)
        made.add_argument("--overwrite", action="store_true", help="replace files of another kind too")

    def add_data(made: argparse._ActionsContainer, required: bool = True) -> None:
        made.add_argument(
            "--data", required=required, nargs="+", help="question JSONL, LLaVA JSON, dataset folders or hub names, "
            "a split as NAME:SPLIT; embedded: digit-scenes/calibration, digit-scenes/test, the same of digit-details",
        )  # fmt: skip
        made.add_argument("--image-folder", help="where the images' names begin (default: beside the data)")
        made.add_argument("--samples", type=_positive, help="draw so many samples of each (default: all)")
        made.add_argument("--seed", type=_seed, default=0, help="seed of the draw")
        made.add_argument("--skip-bad", action="store_true", help="leave unusable entries out instead of stopping")

    made = command(
        "measure", _measure, "measure a model's attention statistics on calibration data",
        "fitprune measure digit-scenes --data digit-scenes/calibration -o stats.safetensors",
    )  # fmt: skip
    add_model(made)
    add_data(made)
    add_output(made, "statistics file to write", required=True)
    made.add_argument("--batch-size", type=_positive, default=1)

    made = command(
        "fit", _fit, "fit recipes to budgets from statistics",
        "fitprune fit stats.safetensors --flops-reduction 0.4 0.6 0.8 -o recipes/",
    )  # fmt: skip
    made.add_argument("stats", metavar="STATS", help="file made by 'fitprune measure'")
    budget = made.add_mutually_exclusive_group(required=True)
    budget.add_argument("--flops-reduction", type=float, nargs="+", help="fraction of visual FLOPs to remove")
    budget.add_argument(
        "--kv-cache-reduction", type=float, nargs="+", help="fraction of the image's KV bytes to remove"
    )
    budget.add_argument("--mean-visual-tokens", type=float, nargs="+", help="visual tokens a layer, mean over layers")
    budget.add_argument("--tolerance", type=float, nargs="+", help="share of attention that a layer may lose")
    budget.add_argument(
        "--prefill-latency-reduction",
        type=float,
        nargs="+",
        help="fraction of a prefill's seconds to save, by --profile",
    )
    made.add_argument("--profile", help="latency profile of the device, made by 'fitprune profile'")
    made.add_argument(
        "--visual-tokens", type=_positive, help="image size to meet the budget for (default: most common)"
    )
    made.add_argument(
        "--max-removal-layers", type=_positive, metavar="K", help="remove at no more than K layers, at equal budget: "
        "each costs time (default: all)",
    )  # fmt: skip
    add_output(made, "recipe file; a folder for several budgets", required=True)
    made.add_argument(
        "--objective", choices=["attention", "output"], default="attention", help="the paper's rule, which needs the "
        "statistics alone, or what the model says on --data, which chooses the scorer too (default: attention)",
    )  # fmt: skip
    output = made.add_argument_group("for --objective output")
    add_model(output, "--model")
    add_data(output, required=False)
    output.add_argument("--batch-size", type=_positive, default=8)
    output.add_argument("--max-new-tokens", type=_positive, default=16, help="longest answer that is looked at")
    output.add_argument(
        "--recombine", type=_whole(1, 1000), help="questions for each image, its own and other samples' "
        "(default: 4, or 2 for several budgets)",
    )  # fmt: skip
    output.add_argument("--minutes", type=float, help="take the best found after so long (default: no limit)")
    output.add_argument(
        "--passes", type=float, help="dense passes over the data to search for (default: 36, or 76 for several budgets)"
    )

    made = command(
        "cost", _cost, "show what a recipe costs",
        "fitprune cost llava-1.5-7b:60 --visual-tokens 576 --text-tokens 64",
    )  # fmt: skip
    made.add_argument("recipe", metavar="RECIPE", help=recipe_names)
    made.add_argument("--visual-tokens", type=_positive, help="visual tokens of the sample (default: the recipe's)")
    made.add_argument("--text-tokens", type=_whole(0), default=64)
    made.add_argument(
        "--crops", type=_positive, help="image crops in the vision tower (default: as few as give the tokens)"
    )
    made.add_argument("--value-bytes", type=_whole(1, 16), default=2, help="bytes of a cached value (16-bit: 2)")

    picture = assets.folder("test") / "images" / "0000.jpg"
    made = command(
        "generate", _generate, "answer one question with pruning",
        f"fitprune generate digit-scenes --recipe recipes/flops_reduction-0.6.json --image {picture} "
        "--question 'Which digit is blue?'",
    )  # fmt: skip
    add_model(made)
    made.add_argument("--recipe", help=f"{recipe_names} (default: the one beside the model)")
    add_force(made)
    made.add_argument("--image", required=True)
    made.add_argument("--question", required=True)
    made.add_argument("--max-new-tokens", type=_positive, default=64)

    made = command(
        "evaluate", _evaluate, "compare recipes and published methods with the dense model on questions",
        "fitprune evaluate digit-scenes --data digit-scenes/test --methods all --flops-reduction 0.4 0.6 0.8 "
        "--stats stats.safetensors -o results.json",
    )  # fmt: skip
    add_model(made)
    add_data(made)
    made.add_argument("--recipe", nargs="+", help=f"of each: {recipe_names}")
    add_force(made)
    made.add_argument(
        "--methods", nargs="+", help="methods solved for each budget: all, or names such as fitprune random fastv:k=1 "
        "(docs/baselines.md; default: fitprune)",
    )  # fmt: skip
    made.add_argument("--flops-reduction", type=float, nargs="+", help="budgets: fractions of visual FLOPs to remove")
    made.add_argument("--stats", help="statistics that methods are solved with; made by 'fitprune measure'")
    made.add_argument("--seeds", type=_seed, nargs="+", default=[0, 1, 2], help="of methods that draw at random")
    add_output(
        made, "results file to write; each sample's answers go beside it, and a run that was killed goes on from them",
        required=True,
    )  # fmt: skip
    made.add_argument("--batch-size", type=_positive, default=8)
    made.add_argument("--max-new-tokens", type=_positive, default=16)
    made.add_argument(
        "--metric", choices=METRICS, help="how answers are judged, in every task (default: by the data: vqa for ten "
        "annotators' answers, else normalized)",
    )  # fmt: skip
    made.add_argument("--timed-batches", type=_whole(0), default=1, help="batches of each task to time (0: none)")
    made.add_argument("--examples", type=_whole(0), default=8, help="samples shown with picture and kept tokens")

    def add_timed(made: argparse.ArgumentParser) -> None:
        add_model(made, "model", nargs="?")
        made.add_argument(
            "--shape", help="instead of MODEL: random weights of a published architecture, such as llava-1.5-7b, "
            "llava-next-7b, qwen2.5-vl-7b; nothing is downloaded",
        )  # fmt: skip
        made.add_argument("--text-tokens", type=_positive, default=64, help="text tokens of a prompt (default: 64)")
        made.add_argument("--image-size", type=_whole(1, 10_000), default=672, help="pixels a side of MODEL's noise")

    made = command(
        "profile", _profile, "measure what a prefill's parts take on this device, to fit recipes to a latency",
        "fitprune profile MODEL --device cuda -o profile.json",
    )  # fmt: skip
    add_timed(made)
    add_output(made, "profile to write", required=True)
    made.add_argument("--batch-size", type=_positive, default=1)
    made.add_argument(
        "--rounds", type=_whole(1, 10_000), default=3, help="times that a length is measured (default: 3)"
    )

    made = command(
        "benchmark", _benchmark, "time recipes against the dense model on this device, and say where the time goes",
        "fitprune benchmark --shape llava-1.5-7b --recipe llava-1.5-7b:60 --new-tokens 1 16",
    )  # fmt: skip
    add_timed(made)
    made.add_argument("--recipe", nargs="+", help=f"of each: {recipe_names}")
    made.add_argument(
        "--flops-reduction", type=float, nargs="+", help="budgets to fit recipes to, from the statistics of the "
        "image of noise: their speed is meant, not their answers",
    )  # fmt: skip
    made.add_argument("--max-removal-layers", type=_positive, help="of those recipes (default: as 'fitprune fit')")
    made.add_argument("--new-tokens", type=_positive, nargs="+", default=[1, 16], help="tokens of the answers to time")
    made.add_argument("--batch-sizes", type=_positive, nargs="+", default=[1])
    made.add_argument("--rounds", type=_whole(1, 10_000), default=5, help="rounds that count (default: 5)")
    made.add_argument("--profile", help="made by 'fitprune profile' on this device (default: it is measured)")
    add_output(made, "JSON to write, also printed as the last line")

    made = command(
        "report", _report, "make one self-contained HTML page of results",
        "fitprune report results.json -o report.html",
    )  # fmt: skip
    made.add_argument("results", metavar="RESULTS", help="file made by 'fitprune evaluate'")
    add_output(made, "HTML file to write", required=True)

    made = command(
        "analyze", _analyze, "analyse attention statistics and the stability of the recipes that they give",
        "fitprune analyze stats.safetensors -o analysis/",
    )  # fmt: skip
    made.add_argument("stats", metavar="STATS", nargs="+", help="files made by 'fitprune measure', of one model")
    add_output(made, "folder for JSON, CSV tables and pictures", required=True)
    made.add_argument(
        "--flops-reduction", type=float, nargs="+", default=[0.4, 0.6, 0.8], help="budgets (default: 0.4 0.6 0.8)"
    )
    made.add_argument(
        "--resamples", type=_whole(1, 10_000), default=30, help="draws of each calibration size (default: 30)"
    )
    made.add_argument("--seed", type=_seed, default=0, help="seed of draws and halves")
    made.add_argument("--no-pictures", action="store_true", help="JSON and tables alone; needs no matplotlib")

    made = command(
        "convert-llava-hr", _convert_llava_hr, "convert a LLaVA-HR checkpoint of its authors to transformers' format",
        "fitprune convert-llava-hr llava-hr-7b-sft-1024 llava-hr-7b",
    )  # fmt: skip
    made.add_argument("source", metavar="SRC", help="folder with the authors' config.json, weights and tokenizer")
    made.add_argument("destination", metavar="DST", help="folder to write; what a killed run left there is kept")

    command(
        "families", _families, "list the families of models: supported, refused and why, generic",
        "fitprune families",
    )  # fmt: skip

    made = command(
        "demo", _demo, "measure, fit and evaluate the embedded model: the whole way in one command",
        "fitprune demo --quick",
    )  # fmt: skip
    made.add_argument("--quick", action="store_true", help="fewer samples and budgets, no pictures: under a minute")
    add_output(made, "folder for what it makes (default: demo-output)", default="demo-output")
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what was meant where that can be guessed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and self._subparsers is None:  # of a command, which knows its options
            self.error(f"unknown: {' '.join(unknown)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r}: must be one of {', '.join(choices)}{_meant(value, choices)}"
            )

    def error(self, message: str) -> NoReturn:
        for group in self._mutually_exclusive_groups:
            options = [option for action in group._group_actions for option in action.option_strings]
            if group.required and message.startswith("the following") and not set(options) & set(self.words):
                message += f"; and one of {', '.join(options)}"
        known = list(self._option_string_actions)
        options = [word.partition("=")[0] for word in self.words if word.startswith("--")]
        stray = [option for option in options if not any(name.startswith(option) for name in known)]
        message += _meant(stray[0], known) if stray and "did you mean" not in message else ""
        self.exit(2, f"fitprune: error: {_shortened(message)}; see '{self.prog} --help'\n")


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _whole(least: int, most: int = MOST_TOKENS) -> Callable[[str], int]:
    """Make what reads an integer in a range."""

    def read(text: str) -> int:
        number = text.strip()
        if len(number) <= 20 and number.isascii() and number.isdecimal() and least <= int(number) <= most:
            return int(number)
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be an integer of at least {least} and at most {most:,}")

    return read


def _path(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: must be the name of a file or folder")
    return text


def _template(text: str) -> str:
    """Read the two escapes that a shell's quotes leave as they are."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


_positive = _whole(1)
_seed = _whole(0, 2**32 - 1)


if __name__ == "__main__":
    sys.exit(main())
