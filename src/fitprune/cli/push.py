"""`fitprune push`: a recipe into a repository on the Hugging Face hub."""

from __future__ import annotations

import argparse

from fitprune.cli import options, parser
from fitprune.recipes.recipe import PruningRecipe


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "push", run, "push a recipe and its card to the Hugging Face hub",
        "fitprune push r.json me/llava-1.5-7b-60 --private",
    )  # fmt: skip
    command.add_argument("recipe", metavar="RECIPE", type=parser.recipe, help=options.RECIPE_NAMES)
    command.add_argument(
        "repo", metavar="REPO", help="owner/name, or your own repository's name; made where it is missing. A model's "
        "repository is good too. Log in by 'hf auth login' or HF_TOKEN",
    )  # fmt: skip
    who = command.add_mutually_exclusive_group()
    who.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    who.add_argument(
        "--public", dest="private", action="store_false", help="make it public (default: as its owner's settings say)"
    )
    command.add_argument("--revision", help="branch, made where it is missing (default: main)")
    command.add_argument("--base-model", help="the model's hub name, for the card (default: as it was measured)")
    command.add_argument("--message", help="commit message (default: says what the recipe cuts)")
    command.add_argument("--create-pr", action="store_true", help="propose it to the owner as a pull request")
    return command


def run(args: options.Args) -> None:
    """Push, and print the address."""
    address = PruningRecipe.named(args.recipe).push_to_hub(
        args.repo,
        base_model=args.base_model,
        private=args.private,
        commit_message=args.message,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    print(address)
