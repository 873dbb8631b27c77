"""`prune`, `attach` and `kept_positions`: a recipe at work on a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from fitprune.engine.kept import Prefill
from fitprune.engine.pruner import Pruner
from fitprune.engine.rotary import RotaryOffsets
from fitprune.families.images import given_images
from fitprune.recipes.recipe import PruningRecipe
from fitprune.scoring.scorers import Score, Scorer


def prune(
    model: Any,
    recipe: PruningRecipe | str | os.PathLike[str] | None = None,
    scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
    *,
    pool_images: bool = False,
    force: bool = False,
) -> Pruner:
    """Remove visual tokens by `recipe` in every prefill of `model`, until the `with` block ends.

        with prune(model, recipe) as pruner:
            model.generate(**inputs)
        pruner.last.kept  # visual tokens of each layer, sample and image

    For a server or a notebook, which has no block to stay in, see `attach`. Threads may enter the same recipe at once.

    Inside the block, use the model as before: any batch, any number of images, any decoding. At each layer that the
    recipe names, the tokens with the lowest score leave after the attention: the layer's KV cache keeps them, its MLP
    and later layers never see them. The number that leaves comes from the recipe, for each image by its own token
    count; which ones, from this input's own attention, by the recipe's scorer. Kept tokens stay in order and at their
    original positions, and a row of a batch gives what its sample gives alone. Logits keep their dense shape; where a
    token left they are those of a zero hidden state.

    The question, whose attention counts as cross, is the text after the sample's last image in this call. It ends with
    the first position whose logit is asked for or that `labels` give a target to, so a draft, a given answer or labels
    do not decide what leaves. Text between images is kept, and is no question (see
    `fitprune.scoring.received.text_after`).

    A turn that continues a pruned cache prunes its own images by its own question; what left in earlier turns does not
    come back. With scorer "self" what is kept depends on no question, so that one cache can serve many.

    `labels` must be -100 wherever a visual token would make the prediction; the loss over the other positions is that
    of a dense model in which the removed tokens are masked. Gradients flow through what is kept.

    Args:
        model: a supported `...ForConditionalGeneration` model; also inside PEFT, a pipeline or DataParallel.
        recipe: one fitted for this model, or what `PruningRecipe.named` finds it by: a file, a folder, a hub name, a
            published name. None for the one beside the model's weights, in its folder or hub repository.
        scorer: instead of the recipe's own: a name in `fitprune.scoring.scorers.SCORERS`, name and parameters as a
            recipe holds them, a Scorer, or a function from LayerView to scores [B, m].
        pool_images: let the images of a sample share one count and compete for it, instead of one share each.
        force: use a recipe of another model, if that has as many layers.

    Returns:
        The pruner, to be entered by `with`. On exit, also after an exception, the model is as before.

    Raises:
        OSError: a recipe's file cannot be read, nothing has its name, or the hub is out of reach.
        ValueError: there is no recipe beside the model, the recipe is of another model, the scorer is unknown, the
            model's family is not supported; when it is entered, if the model is pruned by another recipe, or measured;
            from a call of the model, where its result could not be exact: docs/calling.md has the list; on exit, if
            another thread is still inside a call.

    Source: arXiv:2409.10197. Differs from the authors' code: any batch, prompt and attention implementation instead of
    one prompt of 35 + 576 tokens under eager attention.
    """
    return Pruner(model, recipe, scorer, pool_images=pool_images, force=force)


def attach(
    model: Any,
    recipe: PruningRecipe | str | os.PathLike[str] | None = None,
    scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
    *,
    pool_images: bool = False,
    force: bool = False,
) -> Pruner:
    """Prune every prefill of `model` until `detach`: for servers, notebooks and Trainer.

        pruner = attach(model, recipe)
        model.generate(**inputs)
        pruner.detach()

    All threads' calls are pruned. Losing the pruner changes nothing: only `detach` ends it. Attach and detach while no
    call of the model is running: one that has begun fails. Everything else is as in the block of `prune`.

    Args:
        model: as for `prune`.
        recipe: as for `prune`.
        scorer: as for `prune`.
        pool_images: as for `prune`.
        force: as for `prune`.

    Returns:
        The pruner, at work.

    Raises:
        OSError: as `prune`.
        ValueError: as `prune`, and as entering its block.
    """
    return Pruner(model, recipe, scorer, pool_images=pool_images, force=force).__enter__()


def kept_positions(
    model: Any,
    recipe: PruningRecipe | str | os.PathLike[str] | None,
    inputs: Mapping[str, Any],
    scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
    *,
    pool_images: bool = False,
    force: bool = False,
) -> list[torch.Tensor]:
    """Run one prefill, and return which positions of the prompt enter each layer.

    Args:
        model: as for `prune`.
        recipe: as for `prune`.
        inputs: of one call: what the processor returned.
        scorer: as for `prune`.
        pool_images: as for `prune`.
        force: as for `prune`.

    Returns:
        For each layer, [B, m] int64: ascending columns of `input_ids`; -1 at padding, and on the left of rows that hold
        fewer tokens than the longest.

    Raises:
        ValueError: as for `prune`; or there is no image.
    """
    return run_prefill(prune(model, recipe, scorer, pool_images=pool_images, force=force), inputs).positions


def run_prefill(pruner: Pruner, inputs: Mapping[str, Any]) -> Prefill:
    """Run one prefill of a pruner's model, without gradients, and return what it kept.

    Args:
        pruner: not attached, or attached.
        inputs: of one call: what the processor returned.

    Raises:
        ValueError: as for `prune`; or there is no image.
    """
    call = {**inputs, "use_cache": False}
    if "labels" not in inputs:
        call.setdefault("logits_to_keep", 1)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask.all()) and not RotaryOffsets(pruner._adapted).tracked:
        call.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))  # as generate counts them
    with pruner, torch.no_grad():
        if given_images(inputs) is None:
            raise ValueError("the inputs have no image: nothing is pruned; pass the processor's pixel_values")
        pruner.model(**call)
        assert pruner.last is not None
        return pruner.last
