"""`fitprune generate`: one answer to one question about one image, pruned, and beside it the dense model's."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitprune._support import assets, files
from fitprune._support.text_tables import aligned, scaled
from fitprune.cli import options, parser
from fitprune.recipes.recipe import PruningRecipe

if TYPE_CHECKING:
    from fitprune.calibration.samples import Sample
    from fitprune.engine.kept import Prefill
    from fitprune.speed.answering import TimedAnswer

ENDINGS = ".gif, .mp4, .png, .svg or .html"


def add(commands: options.Commands) -> argparse.ArgumentParser:
    """Declare the command."""
    command = options.command(
        commands, "generate", run, "answer one question with pruning",
        "fitprune generate digit-scenes --recipe r.json --image digit-scenes/test/images/0000.jpg \\\n"
        "    --question 'Which digit is blue?' --dense --picture kept.html",
    )  # fmt: skip
    options.add_model(command)
    command.add_argument("--image", required=True, help="image file; the example has one of the bundled data")
    command.add_argument("--question", required=True, help="the question, without the image token")
    add_answer(command)
    command.add_argument(
        "--picture", type=parser.path, metavar="FILE", help="draw which visual tokens stay, layer by layer, as "
        f"'fitprune show' does; FILE ends in {ENDINGS}",
    )  # fmt: skip
    command.add_argument("--overwrite", action="store_true", help="let --picture replace a file of another kind too")
    return command


def add_answer(to: argparse.ArgumentParser) -> None:
    """Add by which recipe a question is answered, and how."""
    to.add_argument("--recipe", type=parser.recipe, help=f"{options.RECIPE_NAMES} (default: the one beside the model)")
    options.add_force(to)
    to.add_argument(
        "--max-new-tokens", type=parser.positive, default=64, help="most tokens of the answer (default: 64)"
    )
    to.add_argument("--dense", action="store_true", help="let the dense model answer too, and compare")


def run(args: options.Args) -> None:
    """Print the answer."""
    replaced = "" if args.picture is None else claim(args.picture, overwrite=args.overwrite)
    answered = answer(args, args.image)
    if args.dense:
        print(answered.table())
    else:
        print(answered.texts["pruned"])
    if args.picture is not None:
        answered.draw(args.picture)
        print(f"{args.picture}{replaced}")


def claim(path: str, *, overwrite: bool) -> str:
    """Find out before long work that a picture can be drawn into a file; gives what `files.claim` does."""
    from fitprune.pictures.save import writer

    writer(path)
    return files.claim(path, files.PICTURE, overwrite=overwrite)


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question that was answered.

    Attributes:
        args: the command's.
        sample: question and image.
        model: what answered.
        processor: its processor.
        recipe: by which it was pruned; None for the one beside the model.
        texts: "dense" and "pruned" -> the answer; the first with --dense alone.
        timed: the same, as it was timed.
        kept: what the pruned prefill kept.
    """

    args: options.Args
    sample: Sample
    model: Any
    processor: Any
    recipe: PruningRecipe | None
    texts: dict[str, str]
    timed: dict[str, TimedAnswer]
    kept: Prefill

    def table(self) -> str:
        """Write both answers, and what each took."""
        total = sum(self.kept.visual_tokens[0])
        left = {"dense": total, "pruned": sum(self.kept.kept[-1][0])}
        rows = [
            ("", *self.timed),
            ("visual tokens at the end", *(f"{left[name]:,}" for name in self.timed)),
            ("KV cache", *(scaled(timed.kv_bytes, "B") for timed in self.timed.values())),
            ("time to first token", *(_milliseconds(timed.first_seconds) for timed in self.timed.values())),
            ("time for each further one", *(_milliseconds(timed.token_seconds) for timed in self.timed.values())),
        ]
        answers = [f"{name:<8}{text}" for name, text in self.texts.items()]
        same = "the same answer" if len(set(self.texts.values())) == 1 else "the answers differ"
        return "\n".join([*answers, f"({same})", "", aligned(rows)])

    def draw(self, path: str) -> None:
        """Write which visual tokens stay."""
        from fitprune.pictures.example import example_of
        from fitprune.pictures.save import save_example

        prompt = {"prompt_template": self.args.prompt_template, "force": self.args.force}
        example = example_of(self.model, self.processor, self.recipe, self.sample, self.texts, **prompt)
        save_example(example, path)


def answer(args: options.Args, image: str) -> Answered:
    """Answer the question of `args` about an image, pruned; with --dense, dense too."""
    from fitprune.calibration.batches import make_batches
    from fitprune.calibration.pictures import located
    from fitprune.calibration.prompts import format_prompt
    from fitprune.calibration.samples import Sample
    from fitprune.engine.prune import prune
    from fitprune.families.inputs import to_model
    from fitprune.speed.answering import timed_answer

    recipe = None if args.recipe is None else PruningRecipe.named(args.recipe)
    sample = Sample("0", args.question, located(_bundled(image), Path()), where="--image")
    sample.load_image()
    model, processor = options.load(args)
    format_prompt(processor, args.question, args.prompt_template)  # so that its fault is not laid to --image
    inputs = to_model(next(make_batches([sample], processor, prompt_template=args.prompt_template, model=model)), model)
    pruner, timed = prune(model, recipe, force=args.force), {}
    with pruner:
        if args.dense:
            with pruner.paused():
                timed_answer(model, inputs, 2)  # the first calls of a process are slower
                timed["dense"] = timed_answer(model, inputs, args.max_new_tokens)
            timed_answer(model, inputs, 2)
        timed["pruned"] = timed_answer(model, inputs, args.max_new_tokens)
        kept = pruner.last
    assert kept is not None  # a prompt has an image
    texts = {name: processor.batch_decode(of.ids, skip_special_tokens=True)[0].strip() for name, of in timed.items()}
    return Answered(args, sample, model, processor, recipe, texts, timed, kept)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f} ms"


def _bundled(image: str) -> str:
    """Find a picture of the bundled data by its name, such as digit-scenes/test/images/0000.jpg; other names stay."""
    data = next((name for name in assets.DATA if image.startswith(f"{name}/")), None)
    return image if data is None or Path(image).exists() else assets.resolve(data) + image.removeprefix(data)
