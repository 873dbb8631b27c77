"""Find the recipe that a call asks for, and check that it may be used on the model at hand."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from fitprune._support import assets
from fitprune.costs.sizes import ModelFingerprint
from fitprune.recipes import hub, pretrained
from fitprune.recipes.recipe import PruningRecipe

RECIPE_VARIABLE = "FITPRUNE_RECIPE"  # of the environment: a recipe's name, where a server is started

_REMEDY = (
    "pass a recipe: one fitted by 'fitprune measure' and 'fitprune fit', or a published one such as 'llava-1.5-7b:60'; "
    "recipe.save_pretrained(folder) puts it beside the weights"
)


def find_recipe(model: Any, recipe: PruningRecipe | str | os.PathLike[str] | None) -> PruningRecipe:
    """Take the recipe that is passed, itself or by name, or the one beside the model's weights.

    Args:
        model: the model that it is for.
        recipe: a recipe, a name as `PruningRecipe.named` takes it, or None for the one beside the model.

    Raises:
        OSError: as `PruningRecipe.named`; or the model is from the hub, which is out of reach.
        ValueError: it is something else, there is none beside the model, or a file is no recipe.
    """
    if isinstance(recipe, PruningRecipe):
        return recipe
    if recipe is None:
        return recipe_beside(model)
    if not isinstance(recipe, (str, os.PathLike)):
        raise ValueError(f"recipe is a {type(recipe).__name__}: must be a PruningRecipe, its name, or None")
    return PruningRecipe.named(recipe)


def recipe_beside(model: Any) -> PruningRecipe:
    """Read fitprune_recipe.json of the folder or hub repository that the model was loaded from.

    The revision is the one of the weights where it is known, as after `load_model`: transformers does not keep it.

    Args:
        model: with a `config` and, unless it was made from scratch, the place that it was loaded from.

    Raises:
        OSError: the hub is out of reach, or refuses.
        ValueError: there is no recipe, the model was not loaded from a place, or the file is no recipe.
    """
    config = getattr(model, "config", None)
    place = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
    if not place:
        raise ValueError(f"no recipe is passed, and this model was loaded from no folder or hub name; {_REMEDY}")
    place = assets.resolve(place)
    looked = f"no recipe is passed: looked for {hub.RECIPE_FILE} beside the model, but"
    revision = None if os.path.isdir(place) else getattr(config, "_commit_hash", None)
    try:
        return PruningRecipe.from_pretrained(place, revision=revision)
    except FileNotFoundError as error:
        raise ValueError(f"{looked} {str(error).removesuffix(pretrained.REMEDY)}; {_REMEDY}") from None
    except ConnectionError as error:
        raise ConnectionError(f"{looked} {error}") from error


def fitted_to(
    recipe: PruningRecipe, fingerprint: ModelFingerprint, *, force: bool, what: str = "recipe"
) -> PruningRecipe:
    """Check that a recipe may be used on a model of this fingerprint.

    Args:
        recipe: the recipe.
        fingerprint: the model's.
        force: use it on another model too, if both have the same number of layers.
        what: the recipe's name in errors.

    Returns:
        The recipe; one of another model gets this one's fingerprint, so that costs are those of what runs.

    Raises:
        ValueError: it is of another model, or, with `force`, of one with another number of layers; or it removes tokens
            at layers that they may not leave in this model.
    """
    if not isinstance(recipe, PruningRecipe):
        raise ValueError(f"{what} is a {type(recipe).__name__}: must be a PruningRecipe, as of PruningRecipe.named")
    if not force:
        recipe.model.require_same(fingerprint, what=what)
    there, here = len(recipe.keep), fingerprint.decoder.layers
    if there != here:
        raise ValueError(f"{what} has {there} layers, the model {here}: force=True cannot help; fit one for this model")
    allowed = fingerprint.decoder.prunable
    if any(layer not in allowed for layer in recipe.removing):
        raise ValueError(
            f"{what} removes tokens at layers {list(recipe.removing)}: in a {fingerprint.model_type} model they may "
            f"leave layers {list(allowed)} alone ('fitprune families' says why); fit a recipe from this model's "
            "statistics"
        )
    if not force or recipe.model == fingerprint:
        return recipe
    provenance = {**recipe.provenance, "forced_from": recipe.model.to_dict()}
    return dataclasses.replace(recipe, model=fingerprint, provenance=provenance)
