"""`fitprune recipe`: from a model to recipes in one command: it measures, keeps the statistics, and fits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import assets, files
from fitprune._support.messages import short
from fitprune._support.text_tables import plural
from fitprune.cli import options
from fitprune.cli.fit import fitted
from fitprune.cli.measure import add_batch_size, has_parts, measured
from fitprune.cli.outputs import RecipeFiles

if TYPE_CHECKING:
    from fitprune.fitting.stats import AttentionStats

BUNDLED_DATA = f"{assets.MODEL}/calibration"


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "recipe", run, "measure a model and fit recipes to budgets, in one command",
        "fitprune recipe digit-scenes --flops-reduction 0.6 -o r.json",
        lambda args: has_parts(RecipeFiles.of(args).statistics),
    )  # fmt: skip
    options.add_model(command)
    options.add_data(command, required=False, default=f" (default for the bundled model: {BUNDLED_DATA})")
    options.add_fitting(command)
    options.add_output(
        command, "recipe file; a folder for several budgets. The statistics are kept beside it, as r.stats.safetensors "
        "or stats.safetensors in the folder, and used again while model and data are the same; others are replaced "
        "only with --overwrite", required=True,
    )  # fmt: skip
    add_batch_size(command)
    return command


def run(args: options.Args) -> None:
    """Measure unless that was done before, fit, and write the recipes."""
    from fitprune.calibration.measure import forget_parts
    from fitprune.fitting.stats import AttentionStats

    budgets = options.read_budgets(args)
    outputs = RecipeFiles.of(args)
    path = outputs.statistics
    args.data = args.data or _bundled_data(args.model)
    replaced = outputs.claim(overwrite=args.overwrite)
    ending = files.claim(path, files.STATISTICS, overwrite=args.overwrite)
    kept = None
    try:
        kept = AttentionStats.load(path) if files.kind_of(path) == files.STATISTICS else None
    except ValueError as error:
        if not args.overwrite:
            raise ValueError(f"{error}; --overwrite replaces the file") from error

    def known(model: Any, batches: Callable[[], Any]) -> AttentionStats | None:
        differing = _differing(kept, model, batches) if kept is not None else []
        if differing and not args.overwrite:
            raise ValueError(
                f"{path} holds other statistics ({', '.join(differing)}): pass --overwrite to replace them, or choose "
                "another --output"
            )
        return None if differing else kept

    stats = measured(args, path, known)
    if stats is None:  # another process has them
        return
    recipes = fitted(args, stats, budgets)  # a budget out of reach leaves the old statistics, and the parts of the new
    if stats is not kept:
        stats.save(path)
    forget_parts(f"{path}.parts")
    ending = ", used again" if stats is kept else ending
    print(f"{path}: {plural(len(stats), 'sample')}, {stats.model.decoder.layers} layers{ending}")
    outputs.save(recipes, replaced)


def _bundled_data(model: str) -> list[str]:
    """Name the bundled calibration data; refuse another model than the bundled one, which needs data of its own."""
    if Path(assets.resolve(model)) == assets.folder("model"):
        return [BUNDLED_DATA]
    raise ValueError(
        f"--data is missing: {model} is measured on images and questions like those that it will get. Pass a question "
        "JSONL, a LLaVA JSON, or a dataset's folder or hub name, with --image-folder and --samples 64 or more"
    )


def _differing(kept: AttentionStats, model: Any, batches: Callable[[], Any]) -> list[str]:
    """Say in what the kept statistics differ from those of the model on the batches."""
    from fitprune.families.adapter import adapt
    from fitprune.families.inputs import input_digests
    from fitprune.families.provenance import provenance_of

    adapted = adapt(model)
    there = kept.provenance
    differing = [
        f"{name} {short(there.get(name))} there, {short(value)} here"
        for name, value in provenance_of(adapted.model).items()
        if there.get(name) != value
    ]
    if not differing:
        digests = [digest for batch in batches() for digest in input_digests(adapted, batch)]
        if tuple(digests) != kept.digests:
            here = "others" if len(digests) == len(kept) else len(digests)
            differing = [f"{plural(len(kept), 'sample')} there, {here} here"]
    return differing
