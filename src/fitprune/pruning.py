"""`prune`: a recipe at work on a model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fitprune.adapters import AdaptedModel, adapt
from fitprune.lookup import find_recipe, fitted_to
from fitprune.packing import Choose, Plan
from fitprune.recipe import PruningRecipe
from fitprune.removal import Remover, removing
from fitprune.scoring import Score, Scorer, checked_scores, get_scorer
from fitprune.selection import keep_highest, tokens_of
from fitprune.tokens import kept_counts
from fitprune.views import LayerView


@contextlib.contextmanager
def prune(
    model: Any,
    recipe: PruningRecipe | str | os.PathLike[str] | None = None,
    scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
    *,
    pool_images: bool = False,
    force: bool = False,
) -> Iterator[Any]:
    """Remove visual tokens by `recipe` in every prefill of `model`, until the block ends.

    Inside the block, use the model as ever: any batch, any number of images, any decoding. At each layer that the
    recipe names, the tokens with the lowest score leave after the attention: the layer's KV cache keeps them, its MLP
    and later layers never see them. The number that leaves comes from the recipe, for each image by its own token
    count; which ones, from this input's own attention, by the recipe's scorer. Kept tokens stay in order and at their
    original positions, and a row of a batch gives what its sample gives alone. Logits keep their dense shape; where a
    token left they are those of a zero hidden state.

    The question, whose attention counts as cross, is the text after the sample's last image in this call. It ends with
    the first position whose logit is asked for or that `labels` give a target to, so a draft, a given answer or labels
    do not decide what leaves. Text between images is kept, and is no question (see `fitprune.attention.text_after`).

    A turn that continues a pruned cache prunes its own images by its own question; what left in earlier turns stays
    away. With scorer "self" what is kept depends on no question, so that one cache can serve many.

    `labels` must be -100 wherever a visual token would make the prediction; the loss over the other positions is that
    of a dense model in which the removed tokens are masked. Gradients flow through what is kept.

    Args:
        model: a supported `...ForConditionalGeneration` model.
        recipe: fitted for this model; whole, or what `PruningRecipe.named` finds it by: a file, a folder, a hub name, a
            published name. None for the one beside the model's weights, in its folder or hub repository.
        scorer: instead of the recipe's own: a name in `fitprune.scoring.SCORERS`, name and parameters as a recipe
            holds them, a Scorer, or a function from LayerView to scores [B, m].
        pool_images: let the images of a sample share one count and compete for it, instead of one share each.
        force: use a recipe of another model, if that has as many layers.

    Yields:
        `model`. On exit, also after an exception, it is as it was found.

    Raises:
        OSError: a recipe's file cannot be read, nothing has its name, or the hub is out of reach.
        ValueError: there is no recipe beside the model, the recipe is of another model, the scorer is unknown, the
            model's family is not supported or the model is pruned already; from a call of the model, where its result
            could not be exact: docs/calling.md has the list; on exit, if another thread is still inside a call.

    Source: arXiv:2409.10197. Differs from the authors' code: any batch, prompt and attention implementation instead of
    one prompt of 35 + 576 tokens under eager attention.
    """
    with remover_by(model, recipe, scorer, pool_images, force):
        yield model


def kept_positions(
    model: Any,
    recipe: PruningRecipe | str | os.PathLike[str] | None,
    inputs: Mapping[str, Any],
    scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
    *,
    pool_images: bool = False,
    force: bool = False,
) -> list[torch.Tensor]:
    """Run one prefill and tell which positions of the prompt enter each layer; arguments as for `prune`.

    Returns:
        For each layer, [B, m] int64: ascending columns of `input_ids`; -1 at padding, and on the left of rows that hold
        fewer tokens than the longest.

    Raises:
        ValueError: as for `prune`; or there is no image.
    """
    call = {**inputs, "use_cache": False}
    if "labels" not in inputs:
        call.setdefault("logits_to_keep", 1)
    with remover_by(model, recipe, scorer, pool_images, force) as remover, torch.no_grad():
        model(**call)
    if not remover.entered:
        raise ValueError("the inputs have no image: nothing is pruned; pass the processor's pixel_values")
    return remover.entered


def remover_by(
    model: Any,
    recipe: PruningRecipe | str | os.PathLike[str] | None,
    scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
    pool_images: bool = False,
    force: bool = False,
) -> contextlib.AbstractContextManager[Remover]:
    """Prune as `prune` does, and give what removes the tokens."""
    adapted = adapt(model)
    recipe = fitted_to(find_recipe(model, recipe), adapted.shape, force=force)
    _require_prunable(recipe, adapted)
    used = get_scorer(recipe.scorer if scorer is None else scorer)
    plan = plan_by(recipe, used, pool_images)
    return removing(adapted, plan, needs_question=used.query_aware, reads_vision=used.reads_vision)


def _require_prunable(recipe: PruningRecipe, adapted: AdaptedModel) -> None:
    """Refuse a recipe by which tokens leave where the model's family does not let them."""
    allowed = adapted.shape.decoder.prunable
    if wrong := [layer for layer in recipe.removing if layer not in allowed]:
        raise ValueError(
            f"recipe removes tokens at layers {wrong}: from model_type={adapted.shape.model_type!r} tokens leave "
            f"{adapted.family.removal}, which are {list(allowed)}; fit a recipe from this model's statistics"
        )


def plan_by(recipe: PruningRecipe, scorer: Scorer, pool_images: bool = False) -> Plan:
    """Make the function that plans a prefill: how many tokens of each image are left at each layer."""

    def plan(image: torch.Tensor) -> Choose:
        original = tokens_of(_pooled(image) if pool_images else image)
        if not original[0]:  # the mask hides every visual token
            return lambda _: None
        # [2 * layers + 1, B, images]: in the prompt, then into and after each layer.
        fractions = [f for pair in zip(recipe.entering, recipe.keep, strict=True) for f in pair]
        left = torch.tensor([[[n, *kept_counts(fractions, n)] for n in row] for row in original]).permute(2, 0, 1)
        last = max((step for step in range(len(fractions)) if not torch.equal(left[step], left[step + 1])), default=-1)

        def choose(view: LayerView) -> torch.Tensor | None:
            step = 2 * view.layer + (0 if view.before else 1)
            if scorer.accumulates and not view.before and step <= last:
                view.prompt.accumulate(view)
            if torch.equal(left[step], left[step + 1]):
                return None
            view.group = _pooled(view.image) if pool_images else view.image
            view.left = left[step + 1].to(view.image.device)
            return keep_highest(checked_scores(scorer.score(view), view.image), view.group, view.left)

        return choose

    return plan


def _pooled(image: torch.Tensor) -> torch.Tensor:
    """All images of a sample as one."""
    return image.clamp(max=0)
