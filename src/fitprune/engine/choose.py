"""Which visual tokens leave by a recipe: how many of each image, and of these the ones with the lowest scores."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fitprune.engine.running import Choose
from fitprune.families.images import tokens_of
from fitprune.fitting.rules import keep_highest
from fitprune.recipes.recipe import PruningRecipe
from fitprune.recipes.rounding import kept_counts
from fitprune.scoring.scorers import Scorer
from fitprune.scoring.view import LayerView, Quotas


def quotas_by(recipe: PruningRecipe, pool_images: bool = False) -> Callable[[torch.Tensor], Quotas]:
    """Make the function from a prefill's images, [B, Q] as `Prompt.images`, to the tokens that each may keep."""
    # In the prompt, then before and inside each layer.
    fractions = [f for pair in zip(recipe.entering, recipe.keep, strict=True) for f in pair]

    def quotas(image: torch.Tensor) -> Quotas:
        tokens = tokens_of(image.clamp(max=0) if pool_images else image)
        counts = [[[n, *kept_counts(fractions, n)] for n in row] for row in tokens]
        size = len(tokens), len(tokens[0]), len(fractions) + 1  # no images where the mask hides every visual token
        return Quotas(torch.tensor(counts, dtype=torch.long).view(size).permute(2, 0, 1), pool_images)

    return quotas


def choose_by(scorer: Scorer) -> Choose:
    """Make the function that keeps each image's tokens with the highest scores, as many as its quota."""

    def choose(view: LayerView) -> torch.Tensor | None:
        quotas, place = view.quotas, view.number
        if scorer.accumulates and not view.before and place <= quotas.last:
            view.prompt.accumulate(view)
        if torch.equal(quotas.counts[place], quotas.counts[place + 1]):
            return None
        return keep_highest(scorer(view), view.group, view.left)

    return choose
