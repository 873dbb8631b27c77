"""What commands share: packs of options, and what is read, loaded or built by them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune.cli import parser
from fitprune.recipes.recipe import PruningRecipe

if TYPE_CHECKING:
    from fitprune.benchmarks.base import Benchmark
    from fitprune.calibration.samples import Sample
    from fitprune.fitting.budget import Budget

Commands = Any  # argparse's _SubParsersAction, which is generic for type checkers alone
Args = argparse.Namespace

RECIPE_NAMES = "recipe file or folder, hub name, or a published one such as llava-1.5-7b:60"
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("bnb-4bit", "bnb-8bit", "torchao-int8")
# Options that go on to `load_model` under their own names.
LOADING = ("revision", "dtype", "device", "device_map", "attn_implementation", "quantization", "trust_remote_code")
BUDGETS = {
    "flops_reduction": "fraction of the visual tokens' FLOPs to remove",
    "kv_cache_reduction": "fraction of the visual tokens' KV-cache bytes to remove",
    "mean_visual_tokens": "visual tokens that enter a layer, mean over layers",
    "tolerance": "share of the received attention that a layer may lose",
    "prefill_latency_reduction": "fraction of the prefill's seconds to save, by --profile",
}


def command(
    commands: Commands,
    name: str,
    run: Callable[[Args], None],
    help_text: str,
    example: str,
    resumable: Callable[[Args], bool] = lambda _: False,
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: where to add it.
        name: what the user types.
        run: runs it.
        help_text: what it does, without the full stop.
        example: one call that works on the bundled model where it can.
        resumable: whether the same call, once interrupted, goes on from what it left.
    """
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=parser.HelpFormatter,
    )
    added.add_argument("--debug", action="store_true", help="show the traceback of an error")
    added.set_defaults(run=run, resumable=resumable)
    return added


def add_model(to: argparse.ArgumentParser, name: str = "model", **options: Any) -> None:
    """Add MODEL, as an argument or as the option `name`, and how it is loaded and prompted."""
    to.add_argument(name, metavar="MODEL", help="folder or hub name; 'digit-scenes' is the bundled model", **options)
    to.add_argument("--revision", help="branch, tag or commit of MODEL on the hub (default: main)")
    to.add_argument("--dtype", default="auto", choices=DTYPES, help="default: the checkpoint's")
    where = to.add_mutually_exclusive_group()
    where.add_argument("--device", help="for example cpu, cuda, cuda:1 (default: cpu)")
    where.add_argument("--device-map", help="spread MODEL over devices: auto, balanced, sequential")
    to.add_argument("--attn-implementation", help="such as sdpa, eager, flash_attention_2")
    to.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="quantize the weights while loading (docs/quantization.md)"
    )
    to.add_argument("--trust-remote-code", action="store_true", help="run code that MODEL's repository brings")
    to.add_argument(
        "--prompt-template", type=parser.template, help="instead of the chat template, with \\n for a new line and \\t "
        "for a tab: 'USER: <image>\\n{question} ASSISTANT:'",
    )  # fmt: skip


def load(args: Args) -> tuple[Any, Any]:
    """Load model and processor as the options of `add_model` say."""
    from transformers.utils import logging as transformers_logging

    from fitprune.families.loading import load_model

    transformers_logging.disable_progress_bar()
    return load_model(args.model, **{name: getattr(args, name) for name in LOADING})


def add_data(to: argparse.ArgumentParser, *, required: bool = True, default: str = "") -> None:
    """Add --data and what is taken of it."""
    to.add_argument(
        "--data", required=required, nargs="+", help="question JSONL, LLaVA JSON, dataset folders or hub names, "
        "a split as NAME:SPLIT; bundled: digit-scenes/calibration, digit-scenes/test, the same of digit-details"
        + default,
    )  # fmt: skip
    to.add_argument("--image-folder", help="folder that image names are relative to (default: the data file's)")
    to.add_argument("--samples", type=parser.positive, help="number of samples to draw from each (default: all)")
    to.add_argument("--seed", type=parser.seed, default=0, help="seed of the draw (default: 0)")
    to.add_argument("--skip-bad", action="store_true", help="leave unusable entries out instead of stopping")


def read_samples(args: Args) -> dict[str, list[Sample]]:
    """Read every --data: its name -> its samples."""
    from fitprune.calibration.samples import load_samples

    require_different("--data", args.data or [])
    options = {"samples": args.samples, "seed": args.seed, "skip_bad": args.skip_bad}
    return {name: load_samples(name, args.image_folder, **options) for name in args.data or []}


DATA_ROOT = "playground/data/eval"  # where LLaVA's scripts look


def add_data_root(to: argparse.ArgumentParser) -> None:
    """Add --data-root."""
    to.add_argument(
        "--data-root", type=parser.path, help="folder of the benchmarks' files, laid out as LLaVA's eval.zip "
        f"(default: {DATA_ROOT})", default=DATA_ROOT,
    )  # fmt: skip


def add_benchmarks(to: argparse.ArgumentParser) -> None:
    """Add --benchmark, where its files lie, and how its questions become prompts."""
    to.add_argument(
        "--benchmark", nargs="+", default=[], metavar="NAME", help="question sets with their official metric, such as "
        "textvqa gqa pope; 'fitprune benchmarks' lists them",
    )  # fmt: skip
    add_data_root(to)
    to.add_argument(
        "--protocol", choices=("llava", "chat"), help="how a benchmark's questions become prompts: llava, as LLaVA's "
        "own scripts; chat, by the processor's template (default: llava for LLaVA models)",
    )  # fmt: skip


def read_benchmarks(args: Args) -> list[tuple[Benchmark, list[Sample]]]:
    """Read every --benchmark's questions."""
    from fitprune.benchmarks.reading import load_benchmark
    from fitprune.benchmarks.table import get_benchmark

    benchmarks = [get_benchmark(name) for name in args.benchmark]
    require_different("--benchmark", [benchmark.name for benchmark in benchmarks])
    for benchmark in benchmarks:
        if benchmark.upload:
            benchmark.upload.require(benchmark.name)
    root, draw = Path(args.data_root), {"samples": args.samples, "seed": args.seed}
    return [(benchmark, load_benchmark(benchmark, root, **draw)) for benchmark in benchmarks]


def joined(tasks: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    """Put the samples of all tasks into one list."""
    return [sample for samples in tasks.values() for sample in samples]


def usable(args: Args, samples: list[Sample], processor: Any, model: Any) -> list[Sample]:
    """With --skip-bad, leave out what the processor refuses; without, its batch will name it."""
    from fitprune.calibration import batches

    if not args.skip_bad:
        return samples
    return batches.usable(samples, processor, prompt_template=args.prompt_template, model=model)


def add_output(to: argparse.ArgumentParser, help_text: str, **options: Any) -> None:
    """Add --output and --overwrite."""
    to.add_argument("-o", "--output", type=parser.path, help=help_text, **options)
    to.add_argument("--overwrite", action="store_true", help="replace files of another kind too")


def add_budgets(to: argparse.ArgumentParser, *, latency: bool = True) -> None:
    """Add the kinds of budget, of which one is to be passed, and the image size that it is met for."""
    group = to.add_mutually_exclusive_group(required=True)
    for kind, text in BUDGETS.items():
        if latency or kind != "prefill_latency_reduction":
            group.add_argument(option_of(kind), type=float, nargs="+", metavar="X", help=text)
    to.add_argument(
        "--visual-tokens", type=parser.positive, help="image size to meet the budget for (default: the most common)"
    )


def add_fitting(to: argparse.ArgumentParser) -> None:
    """Add what a fit by the paper's rule is asked for."""
    add_budgets(to)
    to.add_argument("--profile", help="latency profile of the device, made by 'fitprune profile'")
    to.add_argument(
        "--max-removal-layers", type=parser.positive, metavar="K", help="remove at no more than K layers, at equal "
        "budget: each costs time (default: all)",
    )  # fmt: skip


def budget_values(args: Args) -> tuple[str, list[float]]:
    """Give the kind and the values of the budgets that were passed."""
    kind = next(kind for kind in BUDGETS if getattr(args, kind, None))
    return kind, getattr(args, kind)


def read_budgets(args: Args) -> list[Budget]:
    """Check the budgets that were passed."""
    from fitprune.costs.latency import LatencyProfile
    from fitprune.fitting.budget import checked_budget

    kind, values = budget_values(args)
    path = getattr(args, "profile", None)
    profile = None if path is None else LatencyProfile.load(path)
    budgets = [checked_budget(kind, value, profile) for value in values]
    require_different(option_of(kind), values)
    return budgets


def option_of(name: str) -> str:
    """Write an argument's name as its option: flops_reduction -> --flops-reduction."""
    return f"--{name.replace('_', '-')}"


def require_different(option: str, values: Sequence[Any]) -> None:
    """Refuse an option that has one value twice."""
    if repeated := next((value for number, value in enumerate(values) if value in values[:number]), None):
        raise ValueError(f"{option}: {repeated} is passed twice; leave one out")


def add_recipes(to: argparse.ArgumentParser) -> None:
    """Add --recipe for any number of recipes."""
    to.add_argument("--recipe", nargs="+", type=parser.recipe, help=f"any number, each a {RECIPE_NAMES}")


def read_recipes(names: Sequence[str] | None) -> dict[str, PruningRecipe]:
    """Load recipes by the names that tables show: a file's without its ending, a folder's, or the published one's."""
    names = names or []
    sources = {Path(name).name.removesuffix(".json") if Path(name).exists() else name: name for name in names}
    if len(sources) < len(names):
        raise ValueError(f"--recipe {' '.join(names)}: two have the same name; rename one")
    if "dense" in sources:
        raise ValueError(f"--recipe {sources['dense']}: 'dense' names the model without a recipe; rename the file")
    return {name: PruningRecipe.named(source) for name, source in sources.items()}


def add_force(to: argparse.ArgumentParser) -> None:
    """Add --force."""
    to.add_argument("--force", action="store_true", help="use a recipe of another model with as many layers")


def add_timed_model(to: argparse.ArgumentParser) -> None:
    """Add the model and the prompt that are timed."""
    add_model(to, nargs="?")
    to.add_argument(
        "--random-model", metavar="NAME", help="instead of MODEL: random weights of a published architecture, such as "
        "llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b; nothing is downloaded",
    )  # fmt: skip
    to.add_argument("--text-tokens", type=parser.positive, default=64, help="text tokens of a prompt (default: 64)")
    to.add_argument(
        "--image-size", type=parser.whole(1, 10_000), default=672,
        help="width and height of MODEL's image, of noise, in pixels (default: 672)",
    )  # fmt: skip


def timed_model(args: Args) -> tuple[Any, Callable[[int], Any]]:
    """Load MODEL or build --random-model; gives the model, and a function from a batch size to inputs for it."""
    if (args.model is None) == (args.random_model is None):
        raise ValueError("pass either MODEL or --random-model")
    sizes = {"text_tokens": args.text_tokens}
    if args.random_model is None:
        from fitprune.speed.time_recipes import noise_inputs

        model, processor = load(args)
        prompt = {"side": args.image_size, "prompt_template": args.prompt_template}
        return model, lambda size: noise_inputs(model, processor, batch_size=size, **sizes, **prompt)
    import torch

    from fitprune.speed import random_models

    random_models.get_model_row(args.random_model)
    if args.device_map is not None or args.quantization is not None:
        raise ValueError("--random-model makes weights of --dtype on one --device: no --device-map, no --quantization")
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    model = random_models.build(args.random_model, dtype=dtype, device=args.device or "cpu")
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    return model, lambda size: random_models.make_inputs(args.random_model, model, batch=size, **sizes)
