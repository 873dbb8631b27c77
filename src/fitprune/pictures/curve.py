"""Draw how many visual tokens enter each layer, by recipe. Needs no model and no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fitprune._support.charts import NARROW, WIDE, Axis, Series, steps
from fitprune._support.files import PICTURE_MARK
from fitprune._support.page import Html, page
from fitprune.recipes.recipe import PruningRecipe
from fitprune.recipes.rounding import kept_counts


def curve(recipes: Mapping[str, PruningRecipe], visual_tokens: int, title: str, *, file: bool = False) -> Html:
    """Draw the visual tokens that enter each layer, a line for each recipe.

    Args:
        recipes: name -> recipe.
        visual_tokens: of an image.
        title: of the chart.
        file: as an SVG file holds it, instead of for a page.
    """
    series = [
        Series(name, list(enumerate(map(float, kept_counts(recipe.entering, visual_tokens)))), look=number)
        for number, (name, recipe) in enumerate(recipes.items())
    ]
    below, beside = Axis("decoder layer (the first is 0)", whole=True), Axis("visual tokens that enter", low=0)
    wide = NARROW if file else WIDE  # a file is to be read on a phone, too
    return steps(series, title, below, beside, legend=len(series) > 1, file=file, wide=wide)


def curve_file(path: str | os.PathLike[str], recipe: PruningRecipe, visual_tokens: int, title: str) -> str:
    """Draw a recipe's curve as the text of a file: an SVG, or a page.

    Args:
        path: of the file, whose ending decides.
        recipe: what to draw.
        visual_tokens: of an image.
        title: of the picture.

    Raises:
        ValueError: its name ends in neither .svg nor .html.
    """
    ending = Path(path).suffix.lower()
    if ending not in (".svg", ".html"):
        raise ValueError(f"{path}: must end in .svg or .html, the curve of a recipe")
    if ending == ".html":
        return page(title, curve({"": recipe}, visual_tokens, "Tokens by layer"), maker=PICTURE_MARK)
    text = curve({"": recipe}, visual_tokens, title, file=True)
    return text.replace("<title>", f"<metadata>{PICTURE_MARK}</metadata><title>", 1)
