"""`fitprune cost`: what a recipe costs for one sample."""

from __future__ import annotations

import argparse

from fitprune._support.messages import line
from fitprune._support.text_tables import scaled
from fitprune.cli import options, parser
from fitprune.costs.cost import Cost
from fitprune.recipes.recipe import PruningRecipe


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "cost", run, "show what a recipe costs",
        "fitprune cost llava-1.5-7b:60 --visual-tokens 576 --text-tokens 64",
    )  # fmt: skip
    command.add_argument("recipe", metavar="RECIPE", type=parser.recipe, help=options.RECIPE_NAMES)
    add_sample(command)
    return command


def add_sample(to: argparse.ArgumentParser) -> None:
    """Add the size of the sample that a recipe is priced for."""
    to.add_argument("--visual-tokens", type=parser.positive, help="visual tokens of the sample (default: the recipe's)")
    to.add_argument("--text-tokens", type=parser.whole(0), default=64, help="text tokens of the sample (default: 64)")
    to.add_argument(
        "--crops", type=parser.positive, help="image crops in the vision tower (default: as few as give the tokens)"
    )
    to.add_argument(
        "--value-bytes", type=parser.whole(1, 16), default=2, help="bytes of a cached value (default: 2, as of 16 bits)"
    )


def price(recipe: PruningRecipe, args: options.Args) -> Cost:
    """Price a recipe as the options of `add_sample` say."""
    return recipe.cost(
        visual_tokens=args.visual_tokens, text_tokens=args.text_tokens, crops=args.crops, value_bytes=args.value_bytes
    )


def run(args: options.Args) -> None:
    """Print the costs."""
    recipe = PruningRecipe.named(args.recipe)
    cost = price(recipe, args)
    means = f"mean {cost.mean_visual_tokens:.1f} a layer, {cost.kept[-1]} at the end"
    print(f"visual tokens       {cost.visual_tokens}, {means}")
    print(f"removed per layer   {' '.join(map(str, recipe.counts(cost.visual_tokens)))}")
    if any(before := recipe.counts_before(cost.visual_tokens)):
        print(f"before each layer   {' '.join(map(str, before))}")
    print("\n".join(cost_lines(recipe, cost)))
    if recipe.scorer["name"] != "fitprune":
        print(f"ranked by           {scorer_of(recipe)}")


def cost_lines(recipe: PruningRecipe, cost: Cost) -> list[str]:
    """Write FLOPs and cache, pruned and dense."""

    def change(after: float, before: float, unit: str) -> str:
        return f"{scaled(after, unit)} against {scaled(before, unit)} dense ({100 * (after / before - 1):+.1f}%)"

    tower = "" if recipe.model.vision else "; without the vision tower, which is not priced"
    return [
        f"visual FLOPs        -{100 * cost.flops_reduction:.2f}% (the paper's accounting: visual tokens alone)",
        f"prefill             {change(cost.prefill_flops, cost.dense_prefill_flops, 'FLOPs')}{tower}",
        f"KV cache            {change(cost.kv_bytes, cost.dense_kv_bytes, 'B')}",
    ]


def scorer_of(recipe: PruningRecipe) -> str:
    """Name the recipe's scorer and say whether this version knows it; imports torch."""
    from fitprune.scoring.scorers import get_scorer

    name = line(str(recipe.scorer["name"])) or "''"
    try:
        get_scorer(recipe.scorer)
    except Exception as error:  # a package's scorer may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return f"{name}, which no model can be pruned by: {kind}{line(error, 200)}"
    return name
