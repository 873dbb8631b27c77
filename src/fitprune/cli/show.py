"""`fitprune show`: what a recipe does, as a table and a curve; and what it does to one picture, as a file."""

from __future__ import annotations

import argparse
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fitprune._support import assets, files
from fitprune._support.text_tables import aligned
from fitprune.cli import cost, generate, options, parser
from fitprune.costs.cost import Cost
from fitprune.pictures.origin import as_text, budget_of
from fitprune.recipes import rounding
from fitprune.recipes.recipe import PruningRecipe

# Options that a picture alone has a use for, or a recipe's table alone; those with other defaults pass.
_OF_IMAGE = (
    "model", "recipe", "dense", "force", "revision", "device", "device_map", "attn_implementation", "quantization",
    "trust_remote_code", "prompt_template",
)  # fmt: skip
_OF_RECIPE = ("visual_tokens", "crops")
BAR = 40  # characters of a bar that is full


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "show", run, "show what a recipe does, or which visual tokens of an image stay",
        "fitprune show llava-1.5-7b:60 -o curve.svg\n"
        "  fitprune show digit-scenes/test/images/0000.jpg --question 'Which digit is blue?' \\\n"
        "    --model digit-scenes --recipe r.json -o kept.gif",
    )  # fmt: skip
    command.add_argument(
        "what", metavar="RECIPE or IMAGE", type=parser.recipe, help=f"{options.RECIPE_NAMES}; or an image file"
    )
    options.add_output(
        command, "file to draw into: a recipe's curve as .svg or .html; tokens of an image as "
        f"{generate.ENDINGS}",
    )  # fmt: skip
    cost.add_sample(command)
    command.add_argument("--question", help="about IMAGE, without the image token; then pass --model and -o too")
    options.add_model(command, "--model")
    generate.add_answer(command)
    return command


def run(args: options.Args) -> None:
    """Print and draw a recipe, or draw a picture."""
    if args.question is None:
        if files.kind_of(args.what) == files.IMAGE or (mimetypes.guess_type(args.what)[0] or "").startswith("image/"):
            if not os.path.exists(args.what) and not args.what.startswith(tuple(f"{name}/" for name in assets.DATA)):
                raise FileNotFoundError(f"{args.what}: no such file")
            raise ValueError(f"{args.what} is an image: pass --question, --model and -o too")
        _refuse(args, _OF_IMAGE, "only of use for an image; pass --question too")
        _show_recipe(args)
        return
    if not args.question.strip():
        raise ValueError("--question: is empty; ask something about the image")
    _refuse(args, _OF_RECIPE, "only of use for a recipe; leave out --question")
    if args.model is None or args.output is None:
        raise ValueError("--question: what stays of an image is drawn for a --model, into a file: pass both, -o FILE")
    replaced = generate.claim(args.output, overwrite=args.overwrite)
    try:
        answered = generate.answer(args, args.what)
    except ValueError as error:  # which names an option of `fitprune generate`
        raise ValueError(str(error).removeprefix("--image: ")) from error
    answered.draw(args.output)
    print(f"{args.output}{replaced}")


def _refuse(args: options.Args, names: Sequence[str], why: str) -> None:
    """Refuse options that would change nothing."""
    if extra := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]:
        raise ValueError(f"{', '.join(extra)}: {why}")


def _show_recipe(args: options.Args) -> None:
    recipe = PruningRecipe.named(args.what)
    priced = cost.price(recipe, args)
    drawn = None if args.output is None else _curve(recipe, priced, args)
    decoder, n = recipe.model.decoder, priced.visual_tokens
    print(f"model               {as_text(recipe.model.model_type)}, {decoder.layers} layers of width {decoder.hidden}")
    print(f"budget              {budget_of(recipe.provenance)}")
    plain = recipe.scorer == {"name": "fitprune"}  # the library's own: torch is not needed to say so
    print(f"ranked by           {'fitprune' if plain else cost.scorer_of(recipe)}")
    if parameters := recipe.scorer.get("parameters"):
        print(f"with parameters     {as_text(parameters)}")
    print(f"visual tokens       {n}, mean {priced.mean_visual_tokens:.1f} a layer, {priced.kept[-1]} at the end")
    print("\n".join(cost.cost_lines(recipe, priced)))
    entering = rounding.kept_counts(recipe.entering, n)
    lines = [("layer", "enter", "leave", "stay")]
    lines += [
        (str(layer), str(enters), str(enters - stays), str(stays))
        for layer, (enters, stays) in enumerate(zip(entering, priced.kept, strict=True))
    ]
    bars = ["", *("#" * round(BAR * stays / n) for stays in priced.kept)]
    table = aligned(lines).splitlines()
    print("\n" + "\n".join(f"{line}  {bar}".rstrip() for line, bar in zip(table, bars, strict=True)))
    print("\norigin")
    for name, value in _flat(recipe.provenance):
        print(f"  {name:<32}  {value}")
    if drawn is not None:
        text, replaced = drawn
        files.write_text(args.output, text)
        print(f"\n{args.output}{replaced}")


def _curve(recipe: PruningRecipe, priced: Cost, args: options.Args) -> tuple[str, str]:
    """Draw the curve as the text of a file, and give what `files.claim` does of that file."""
    from fitprune.pictures.curve import curve_file

    title = f"{as_text(recipe.model.model_type)}: {budget_of(recipe.provenance)}"
    text = curve_file(args.output, recipe, priced.visual_tokens, title)
    return text, files.claim(args.output, files.PICTURE, overwrite=args.overwrite)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Write nested values as name.name -> text."""
    for key, value in mapping.items():
        name = f"{prefix}{as_text(key)}"
        if isinstance(value, Mapping) and value and prefix.count(".") < 3:
            yield from _flat(value, f"{name}.")
        else:
            yield name, as_text(value)
