"""`fitprune generate`: one answer to one question about one image, pruned."""

from __future__ import annotations

import argparse
from pathlib import Path

from fitprune._support import assets
from fitprune.cli import options, parser
from fitprune.recipes.recipe import PruningRecipe


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "generate", run, "answer one question with pruning",
        "fitprune generate digit-scenes --recipe r.json --image digit-scenes/test/images/0000.jpg \\\n"
        "    --question 'Which digit is blue?'",
    )  # fmt: skip
    options.add_model(command)
    command.add_argument(
        "--recipe", type=parser.recipe, help=f"{options.RECIPE_NAMES} (default: the one beside the model)"
    )
    options.add_force(command)
    command.add_argument("--image", required=True, help="image file; the example has one of the bundled data")
    command.add_argument("--question", required=True, help="the question, without the image token")
    command.add_argument(
        "--max-new-tokens", type=parser.positive, default=64, help="most tokens of the answer (default: 64)"
    )
    return command


def run(args: options.Args) -> None:
    """Print the answer."""
    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.pictures import located
    from fitprune.calibration.prompts import format_prompt
    from fitprune.calibration.samples import Sample
    from fitprune.engine.prune import prune
    from fitprune.families.inputs import to_model

    recipe = None if args.recipe is None else PruningRecipe.named(args.recipe)
    sample = Sample("0", args.question, located(_bundled(args.image), Path()), where="--image")
    sample.load_image()
    model, processor = options.load(args)
    format_prompt(processor, args.question, args.prompt_template)  # so that its fault is not laid to --image
    inputs = to_model(next(make_batches([sample], processor, prompt_template=args.prompt_template, model=model)), model)
    with prune(model, recipe, force=args.force):
        ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip())


def _bundled(image: str) -> str:
    """Find a picture of the bundled data by its name, such as digit-scenes/test/images/0000.jpg; other names stay."""
    data = next((name for name in assets.DATA if image.startswith(f"{name}/")), None)
    return image if data is None or Path(image).exists() else assets.resolve(data) + image.removeprefix(data)
