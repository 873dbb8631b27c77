"""`fitprune fit`: recipes for budgets from statistics, by the paper's rule."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fitprune.cli import options
from fitprune.cli.outputs import RecipeFiles

if TYPE_CHECKING:
    from fitprune.fitting.budget import Budget
    from fitprune.fitting.stats import AttentionStats
    from fitprune.recipes.recipe import PruningRecipe


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "fit", run, "fit recipes to budgets from statistics",
        "fitprune fit stats.safetensors --flops-reduction 0.4 0.6 0.8 -o recipes/",
    )  # fmt: skip
    command.add_argument("stats", metavar="STATS", help="file made by 'fitprune measure'")
    options.add_fitting(command)
    options.add_output(command, "recipe file; a folder for several budgets", required=True)
    return command


def run(args: options.Args) -> None:
    """Fit, and write the recipes."""
    from fitprune.fitting.stats import AttentionStats

    budgets = options.read_budgets(args)
    outputs = RecipeFiles.of(args)
    # All before the first is written, and before a folder is made for them.
    recipes = fitted(args, AttentionStats.load(args.stats), budgets)
    outputs.save(recipes, outputs.claim(overwrite=args.overwrite))


def fitted(args: options.Args, stats: AttentionStats, budgets: Sequence[Budget]) -> list[PruningRecipe]:
    """Fit each budget as the options of `add_fitting` say."""
    from fitprune.fitting.fit import Fitter

    fitter = Fitter(stats, visual_tokens=args.visual_tokens)
    return [fitter.fit(budget, args.max_removal_layers) for budget in budgets]
