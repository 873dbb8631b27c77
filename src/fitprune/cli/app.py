"""`fitprune app`: a web page on which one moves a budget and sees what leaves, beside the dense model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fitprune._support import assets
from fitprune.cli import options, parser
from fitprune.cli.recipe import BUNDLED_DATA

if TYPE_CHECKING:
    from fitprune.app.served import ServedModel
    from fitprune.calibration.samples import Sample

BATCH = 8  # samples measured at a time
EXAMPLES = 4
# Of the bundled test data: number, and a question of that picture.
BUNDLED = {"digit-scenes/test": (7, 15, 4), "digit-details/test": (0,)}


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "app", run, "open a web page: move a budget, and see what leaves beside the dense model",
        "fitprune app",
    )  # fmt: skip
    options.add_model(command, nargs="?", default=assets.MODEL)
    command.add_argument(
        "--stats", type=parser.path, help="statistics of MODEL, made by 'fitprune measure' (default: --data are "
        "measured; where there are none, the page offers to measure bundled data)",
    )  # fmt: skip
    options.add_data(command, required=False, default=f" (default for the bundled model: {BUNDLED_DATA})")
    command.add_argument("--recipes", type=parser.path, help="folder whose recipes are offered, by their names")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    command.add_argument("--port", type=parser.whole(1, 65_535), default=7860, help="default: 7860")
    command.add_argument("--share", action="store_true", help="open a public link through Gradio's servers")
    return command


def run(args: options.Args) -> None:
    """Load the model, measure it where data are named, and serve the page until it is interrupted."""
    if args.stats is not None and args.data:
        raise ValueError(f"--stats {args.stats} and --data: pass one; --data are measured in place of statistics")
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the app needs Gradio: pip install 'fitprune[app]', or '.[app]' in a clone")
    from fitprune.app.launch import check_address, launch, page_of
    from fitprune.app.python_lines import Source
    from fitprune.app.recipes import Recipes
    from fitprune.app.served import ServedModel
    from fitprune.families.adapter import adapt

    check_address(args.host, args.port)
    bundled = Path(assets.resolve(args.model)) == assets.folder("model")
    args.data = args.data or ([BUNDLED_DATA] if bundled and args.stats is None else None)
    samples = options.joined(options.read_samples(args))  # before the model: bad data is found in seconds
    model, processor = options.load(args)
    recipes = Recipes(adapt(model).fingerprint, args.recipes)
    served = ServedModel(model, processor, recipes, prompt_template=args.prompt_template)
    _add_statistics(args, served, samples)
    name = _bare(args.model)
    examples, pictures = _bundled_examples()
    if not bundled and samples:  # questions of the model's own kind
        examples = [(sample.image, sample.text) for sample in samples if isinstance(sample.image, Path)][:EXAMPLES]
    whole = [args.model, args.stats, *(args.data or []), args.image_folder]
    beside = [Path(each).name for each in whole if each is not None and Path(each).is_absolute()]
    source = Source(_loading(args), args.prompt_template, pictures, beside)
    if chosen := os.environ.get("GRADIO_TEMP_DIR"):
        os.makedirs(chosen, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fitprune-app-", dir=chosen or None) as folder:
        page = page_of(served, source, examples, name, Path(folder))
        url = launch(page, served, args.host, args.port, share=args.share)
        is_open = args.share or args.host not in ("127.0.0.1", "localhost", "::1")
        others = "open to others without a log-in, " if is_open else ""
        print(f"fitprune app: {name} at {url}, {others}until Ctrl-C", flush=True)
        page.block_thread()


def _add_statistics(args: options.Args, served: ServedModel, samples: list[Sample]) -> None:
    """Load statistics, or measure the samples."""
    from tqdm import tqdm

    from fitprune.fitting.fit import Fitter
    from fitprune.fitting.stats import AttentionStats

    if args.stats is not None:
        stats = AttentionStats.load(args.stats)
        stats.model.require_same(served.adapted.fingerprint, what="the statistics file")
        served.recipes.use(Fitter(stats), f"stats = fitprune.AttentionStats.load({_bare(args.stats)!r})")
    elif samples:
        samples = options.usable(args, samples, served.processor, served.model)
        with tqdm(total=len(samples), desc="measure", unit="sample") as bar:
            served.measure(samples, lambda done: bar.update(done - bar.n), _measuring(args), batch_size=BATCH)


def _measuring(args: options.Args) -> str:
    """Write what is measured as Python."""
    drawn = "" if args.samples is None else f", samples={args.samples}, seed={args.seed}"
    folder = "" if args.image_folder is None else f", image_folder={_bare(args.image_folder)!r}"
    lists = [f"fitprune.load_samples({_bare(name)!r}{folder}{drawn})" for name in args.data]
    samples = lists[0] if len(lists) == 1 else f"[{', '.join(f'*{each}' for each in lists)}]"
    template = "" if args.prompt_template is None else f", prompt_template={args.prompt_template!r}"
    return (
        f"samples = {samples}\n"
        f"stats = fitprune.measure(model, fitprune.make_batches(samples, processor, batch_size={BATCH}{template}))"
    )


def _bare(path: str | os.PathLike[str]) -> str:
    """Write a path without the folders that it lies in, since strangers read it; one that is not whole as it is."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def _loading(args: options.Args) -> str:
    """Write the arguments of `load_model`."""
    chosen = {option: getattr(args, option) for option in options.LOADING}
    if chosen["dtype"] == "auto":
        del chosen["dtype"]
    return ", ".join([repr(_bare(args.model)), *(f"{option}={value!r}" for option, value in chosen.items() if value)])


def _bundled_examples() -> tuple[list[tuple[Path, str]], dict[str, str]]:
    """Give pictures of the bundled data with their questions, and each picture's expression in Python."""
    from fitprune.app.limits import Picture
    from fitprune.calibration.samples import load_samples

    examples, pictures = [], {}
    for data, numbers in BUNDLED.items():
        samples = load_samples(data)
        for number in numbers:
            path = Path(str(samples[number].image))
            examples.append((path, samples[number].text))
            pictures[Picture(path.read_bytes(), path.name).digest] = f"fitprune.load_samples({data!r})[{number}].image"
    return examples, pictures
