"""`prune` and `attach`: a recipe at work on a model."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fitprune.engine.remover import Prefill, Remover, paused, removing
from fitprune.engine.rotary import RotaryOffsets
from fitprune.engine.rows import Choose, Plan
from fitprune.families.adapter import AdaptedModel, adapt
from fitprune.families.images import given_images, tokens_of
from fitprune.fitting.rules import keep_highest
from fitprune.recipes.find import find_recipe, fitted_to
from fitprune.recipes.recipe import PruningRecipe, scorer_parts
from fitprune.recipes.rounding import kept_counts
from fitprune.scoring.scorers import Score, Scorer, get_scorer
from fitprune.scoring.view import LayerView

# Decoders that are pruned now. The model's own hooks hold what is attached, so that only `detach` undoes it.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[_Attached]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # while a pruner is attached or detached


class _Attached:
    """One recipe on one model, shared by the pruners that attached it."""

    def __init__(self, key: tuple[Any, ...], removal: contextlib.AbstractContextManager[Remover]) -> None:
        self.key = key
        self.count = 0  # how often it was attached
        self.stack = contextlib.ExitStack()
        self.remover = self.stack.enter_context(removal)
        self.remover.attached = self  # the model's hooks hold the remover, and so this


class Pruner(contextlib.ContextDecorator):
    """A recipe for one model, switched on by `with` or `attach` and off at the end of the block or by `detach`.

    Attributes:
        model: the model that is pruned, without what wraps it (PEFT, a pipeline, DataParallel).
        recipe: the recipe at work.
        scorer: what ranks the tokens.
        remover: what takes them out; None until it was attached.
    """

    def __init__(
        self,
        model: Any,
        recipe: PruningRecipe | str | os.PathLike[str] | None = None,
        scorer: str | Scorer | Mapping[str, Any] | Score | None = None,
        *,
        pool_images: bool = False,
        force: bool = False,
    ) -> None:
        """Arguments as for `prune`."""
        self._adapted = adapt(model)
        self.model = self._adapted.model
        self.recipe = fitted_to(find_recipe(self.model, recipe), self._adapted.fingerprint, force=force)
        _require_prunable(self.recipe, self._adapted)
        scorer = self.recipe.scorer if scorer is None else scorer
        self.scorer = get_scorer(scorer)
        spec = {"name": scorer} if isinstance(scorer, str) else scorer
        named = scorer_parts(spec) if isinstance(spec, Mapping) else self.scorer
        self._key = (self.recipe, named, pool_images)
        self._pool_images = pool_images
        self.remover: Remover | None = None  # the last one at work
        self._entered = 0
        self._before: Prefill | None = None  # what another pruner's prefill kept
        self._unused = True

    def __call__(self, function: Any) -> Any:
        """Make a function that runs inside the block."""
        if not inspect.isfunction(function) and not inspect.ismethod(function):
            raise ValueError(
                f"prune(...) decorates functions, and was given a {type(function).__name__}: call the model"
            )
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(of_kind(function) for of_kind in kinds):
            raise ValueError(
                f"{function.__name__} runs after its call has returned, when the block is over: write "
                "`with prune(model, recipe):` inside it"
            )
        self._unused = False
        return super().__call__(function)

    def __enter__(self) -> Pruner:
        with _LOCK:
            self._unused = False
            found = _ATTACHED.get(self._adapted.decoder, lambda: None)()
            if found is None:
                found = _Attached(
                    self._key,
                    removing(
                        self._adapted,
                        plan_by(self.recipe, self.scorer, self._pool_images),
                        needs_question=self.scorer.query_aware,
                        reads_vision=self.scorer.reads_vision,
                    ),
                )
                _ATTACHED[self._adapted.decoder] = weakref.ref(found)
            elif found.key != self._key:
                raise ValueError(
                    "the model is in use by fitprune, pruned by another recipe or scorer: leave that block or detach() "
                    "that pruner first; for two recipes at once load the model twice, for a dense call use "
                    "`with pruner.paused():`"
                )
            found.count += 1
            if not self._entered:
                self._before = found.remover.last
            self._entered += 1
            self.remover = found.remover
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Stop pruning: the model is as it was found, unless another pruner of the same recipe is still attached.

        Once detached, calling it again does nothing.

        Raises:
            ValueError: another thread is still inside a call of the model.
        """
        with _LOCK:
            if not self._entered or self.remover is None:
                return
            self._entered -= 1
            attached = self.remover.attached
            attached.count -= 1
            if not attached.count:
                del _ATTACHED[self._adapted.decoder]
                attached.stack.close()

    @property
    def attached(self) -> bool:
        """Whether this pruner is at work."""
        return self._entered > 0

    @property
    def last(self) -> Prefill | None:
        """What the last prefill with images kept: of this thread, or of any where this one had none; None before it."""
        last = None if self.remover is None else self.remover.last
        return None if last is self._before else last

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Run the calls of this thread, or task of asyncio, dense inside the block, as for a comparison.

        That holds whichever pruner of the model is at work. Threads that are started inside are pruned as before.
        """
        return paused(self._adapted)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "not attached"
        return f"Pruner({type(self.model).__name__}, {self.recipe!r}, {state})"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(vars(self).get("model"), name):
            raise AttributeError(
                f"a Pruner has no {name!r}: call model.{name} inside `with prune(model, recipe):`, or after "
                "`fitprune.attach(model, recipe)`"
            )
        raise AttributeError(f"'Pruner' object has no attribute {name!r}")

    def __del__(self) -> None:
        if vars(self).get("_unused"):
            warnings.warn(
                "prune(...) was never entered, so the model runs dense: write `with prune(model, recipe):`, or "
                "`pruner = fitprune.attach(model, recipe)`",
                RuntimeWarning,
                stacklevel=2,
            )


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

    Inside the block, use the model as ever: any batch, any number of images, any decoding. At each layer that the
    recipe names, the tokens with the lowest score leave after the attention: the layer's KV cache keeps them, its MLP
    and later layers never see them. The number that leaves comes from the recipe, for each image by its own token
    count; which ones, from this input's own attention, by the recipe's scorer. Kept tokens stay in order and at their
    original positions, and a row of a batch gives what its sample gives alone. Logits keep their dense shape; where a
    token left they are those of a zero hidden state.

    The question, whose attention counts as cross, is the text after the sample's last image in this call. It ends with
    the first position whose logit is asked for or that `labels` give a target to, so a draft, a given answer or labels
    do not decide what leaves. Text between images is kept, and is no question (see
    `fitprune.scoring.received.text_after`).

    A turn that continues a pruned cache prunes its own images by its own question; what left in earlier turns stays
    away. With scorer "self" what is kept depends on no question, so that one cache can serve many.

    `labels` must be -100 wherever a visual token would make the prediction; the loss over the other positions is that
    of a dense model in which the removed tokens are masked. Gradients flow through what is kept.

    Args:
        model: a supported `...ForConditionalGeneration` model; also inside PEFT, a pipeline or DataParallel.
        recipe: fitted for this model; whole, or what `PruningRecipe.named` finds it by: a file, a folder, a hub name, a
            published name. None for the one beside the model's weights, in its folder or hub repository.
        scorer: instead of the recipe's own: a name in `fitprune.scoring.scorers.SCORERS`, name and parameters as a
            recipe holds them, a Scorer, or a function from LayerView to scores [B, m].
        pool_images: let the images of a sample share one count and compete for it, instead of one share each.
        force: use a recipe of another model, if that has as many layers.

    Returns:
        The pruner, to be entered by `with`. On exit, also after an exception, the model is as it was found.

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
        model: as for `prune`, like the other arguments.

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
    if given_images(inputs) is None:
        raise ValueError("the inputs have no image: nothing is pruned; pass the processor's pixel_values")
    pruner = prune(model, recipe, scorer, pool_images=pool_images, force=force)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask.all()) and not RotaryOffsets(pruner._adapted).tracked:
        call.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))  # as generate counts them
    with pruner, torch.no_grad():
        pruner.model(**call)
        assert pruner.last is not None
        return pruner.last.positions


def _require_prunable(recipe: PruningRecipe, adapted: AdaptedModel) -> None:
    """Refuse a recipe by which tokens leave where the model's family does not let them."""
    allowed = adapted.fingerprint.decoder.prunable
    if wrong := [layer for layer in recipe.removing if layer not in allowed]:
        raise ValueError(
            f"recipe removes tokens at layers {wrong}: from model_type={adapted.fingerprint.model_type!r} tokens leave "
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
            return keep_highest(scorer(view), view.group, view.left)

        return choose

    return plan


def _pooled(image: torch.Tensor) -> torch.Tensor:
    """All images of a sample as one."""
    return image.clamp(max=0)
