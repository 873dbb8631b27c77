"""One question about one picture, with what stays of it and what was answered: what is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fitprune.calibration.batches import make_batches
from fitprune.calibration.samples import Sample
from fitprune.families.inputs import to_model
from fitprune.pictures.kept import KeptImage, kept_tokens
from fitprune.pictures.origin import budget_of
from fitprune.recipes.find import find_recipe
from fitprune.recipes.recipe import PruningRecipe


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """What is drawn.

    Attributes:
        picture: as the processor got it.
        kept: what it keeps.
        question: about the picture; "" for none.
        answers: name of a model, such as "dense" -> its answer.
        origin: which model and budget it is of; "" to say nothing.
    """

    picture: Image.Image
    kept: KeptImage
    question: str = ""
    answers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origin: str = ""

    def texts(self) -> dict[str, str]:
        """Say for each answer what is to be read: also of one that is empty."""
        return {name: text if text.strip() else "(an empty answer)" for name, text in self.answers.items()}


def example_of(
    model: Any,
    processor: Any,
    recipe: PruningRecipe | None,
    sample: Sample,
    answers: Mapping[str, str],
    *,
    prompt_template: str | None = None,
    force: bool = False,
) -> Example:
    """Find out what a recipe keeps of a sample's picture.

    Args:
        model: as for `fitprune.prune`.
        processor: the model's.
        recipe: as for `fitprune.prune`.
        sample: question and picture.
        answers: to be shown beside.
        prompt_template: see `fitprune.calibration.prompts.format_prompt`.
        force: as for `fitprune.prune`.

    Raises:
        ValueError: as for `fitprune.kept_tokens`.
    """
    inputs = to_model(next(make_batches([sample], processor, prompt_template=prompt_template, model=model)), model)
    picture = sample.load_image()
    ((kept,),) = kept_tokens(model, recipe, inputs, processor=processor, pictures=[picture], scores=True, force=force)
    budget = budget_of(find_recipe(model, recipe).provenance)
    name = Path(getattr(model, "name_or_path", "")).name or type(model).__name__
    return Example(picture, kept, sample.text, answers, f"{name}, budget {budget}")
