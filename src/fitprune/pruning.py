"""`prune`: a recipe at work on a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fitprune.adapters import adapt
from fitprune.attention import ReceivedAttention
from fitprune.recipe import PruningRecipe
from fitprune.removal import removing
from fitprune.scoring import Scorer, get_scorer
from fitprune.selection import keep_highest
from fitprune.tokens import kept_counts


@contextlib.contextmanager
def prune(model: Any, recipe: PruningRecipe, scorer: str | Scorer = "fitprune") -> Iterator[Any]:
    """Remove visual tokens by `recipe` in every prefill of `model`, until the block ends.

    Inside the block, use the model as ever. At each layer that the recipe names, the tokens with the lowest score leave
    after the attention: the layer's KV cache keeps them, its MLP and later layers never see them. The number that
    leaves comes from the recipe, for each image by its own token count; which ones, from this input's own attention.
    Kept tokens stay in order and at their original positions. Returned logits have a row for each token that is left.

    The question whose attention counts as cross is the text after the last image, up to the first position whose logit
    is asked for: with `logits_to_keep=k`, the last k - 1 tokens (the draft of assisted decoding, a given answer) do not
    decide what leaves. A prompt without an image runs as in the dense model. A batch may be padded, but its samples
    must have the same number of visual tokens.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        recipe: fitted for this model.
        scorer: name in `fitprune.scoring.SCORERS`, or a function from ReceivedAttention to scores [B, N].

    Yields:
        `model`. On exit, also after an exception, it is as it was found.

    Raises:
        ValueError: the recipe is of another model, the scorer is unknown, the model's family is not supported or the
            model is pruned already; from a call of the model: visual tokens differ within the batch, a prompt with an
            image has none, the cache is not a plain DynamicCache, labels are given, or input_ids are not.

    Source: arXiv:2409.10197. Differs from the authors' code: any batch, prompt and attention implementation instead of
    one prompt of 35 + 576 tokens under eager attention.
    """
    adapted = adapt(model)
    recipe.model.require_same(adapted.shape, what="recipe")
    with removing(adapted, _by_recipe(recipe, get_scorer(scorer))):
        yield model


def kept_positions(
    model: Any, recipe: PruningRecipe, inputs: Mapping[str, Any], scorer: str | Scorer = "fitprune"
) -> list[torch.Tensor]:
    """Run one prefill and tell which positions of the prompt enter each layer: a list of [B, n], as for `prune`."""
    adapted = adapt(model)
    recipe.model.require_same(adapted.shape, what="recipe")
    with removing(adapted, _by_recipe(recipe, get_scorer(scorer))) as remover, torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)
    return remover.entered


def _by_recipe(
    recipe: PruningRecipe, scorer: Scorer
) -> Callable[[int, torch.Tensor, Callable[[], ReceivedAttention]], torch.Tensor | None]:
    """Make the function that chooses, per layer, what stays."""
    left: list[torch.Tensor] = []  # per layer [B, images], set at layer 0 of each prefill
    previous: list[torch.Tensor] = []  # the same before the layer

    def choose(layer: int, image: torch.Tensor, received: Callable[[], ReceivedAttention]) -> torch.Tensor | None:
        if layer == 0:
            original = [[int((row == i).sum()) for i in range(int(image.max()) + 1)] for row in image]
            kept = [[kept_counts(recipe.keep, n) for n in row] for row in original]
            per_layer = torch.tensor(kept, device=image.device).permute(2, 0, 1)
            left[:] = per_layer.unbind()
            previous[:] = [torch.tensor(original, device=image.device), *left[:-1]]
        if torch.equal(left[layer], previous[layer]):
            return None
        return keep_highest(scorer(received()), image, left[layer])

    return choose
