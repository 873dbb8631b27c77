"""`fitprune recipe`: from a model to recipes in one command: it measures, keeps the statistics, and fits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import assets, files
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
        "or stats.safetensors in the folder, and used again while model and data are the same", required=True,
    )  # fmt: skip
    add_batch_size(command)
    return command


def run(args: options.Args) -> None:
    """Measure unless that was done before, fit, and write the recipes."""
    from fitprune.fitting.stats import AttentionStats

    budgets = options.read_budgets(args)
    outputs = RecipeFiles.of(args)
    path = outputs.statistics
    args.data = args.data or _bundled_data(args.model)
    replaced = outputs.claim(overwrite=args.overwrite)
    files.claim(path, files.STATISTICS, overwrite=args.overwrite)
    kept = AttentionStats.load(path) if files.kind_of(path) == files.STATISTICS else None
    stats = measured(args, path, lambda model, batches: _if_same(kept, model, batches))
    if stats is None:  # another process has them
        return
    again = ", used again" if stats is kept else ""
    print(f"{path}: {plural(len(stats), 'sample')}, {stats.model.decoder.layers} layers{again}")
    outputs.save(fitted(args, stats, budgets), replaced)


def _bundled_data(model: str) -> list[str]:
    """Name the bundled calibration data; refuse another model than the bundled one, which needs data of its own."""
    if Path(assets.resolve(model)) == assets.folder("model"):
        return [BUNDLED_DATA]
    raise ValueError(
        f"--data is missing: {model} is measured on images and questions like those that it will get. Pass a question "
        "JSONL, a LLaVA JSON, or a dataset's folder or hub name, with --image-folder and --samples 64 or more"
    )


def _if_same(kept: AttentionStats | None, model: Any, batches: Callable[[], Any]) -> AttentionStats | None:
    """Give the kept statistics if they are those of the model on the batches."""
    from fitprune._support.processes import Processes
    from fitprune.families.adapter import adapt
    from fitprune.families.inputs import input_digests
    from fitprune.families.provenance import provenance_of

    if kept is None:
        return None
    adapted = adapt(model)
    now = provenance_of(adapted.model)
    differing = [name for name in now if kept.provenance.get(name) != now[name]]
    if not differing:
        digests = [digest for batch in batches() for digest in input_digests(adapted, batch)]
        differing = [] if tuple(digests) == kept.digests else ["samples"]
    if not differing:
        return kept
    if Processes().rank == 0:
        print(f"the statistics that are there were measured with other {', '.join(differing)}: measured again")
    return None
