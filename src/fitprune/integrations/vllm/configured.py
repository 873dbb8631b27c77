"""The recipe that an engine is to prune by: of the environment, or beside the model."""

from __future__ import annotations

import functools
import os
from typing import Any

from huggingface_hub.errors import HFValidationError
from vllm.logger import init_logger

from fitprune.families.config import fingerprint_of
from fitprune.recipes.find import RECIPE_VARIABLE, fitted_to
from fitprune.recipes.recipe import PruningRecipe

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


def configured_recipe(vllm_config: Any) -> PruningRecipe | None:
    """Find the recipe of the environment, or the one beside the model.

    Args:
        vllm_config: the engine's VllmConfig.

    Returns:
        None where the variable is unset and no recipe is beside the model.

    Raises:
        OSError: the file beside the model cannot be read.
        ValueError: nothing has the variable's name, or it is no recipe, or one of another model.
    """
    model = vllm_config.model_config
    recipe = recipe_for(model.model, model.revision)
    if recipe is None:
        return None
    try:
        return fitted_to(recipe, fingerprint_of(model.hf_config), force=False)
    except ValueError as error:
        raise _of_variable(error) from error


def recipe_for(model: str, revision: str | None) -> PruningRecipe | None:
    """Find the recipe as `configured_recipe`, without a look at whether it is one of the model."""
    if name := os.environ.get(RECIPE_VARIABLE):
        try:
            return PruningRecipe.named(name)
        except (OSError, ValueError) as error:
            raise _of_variable(error) from error
    return _beside(model, None if os.path.isdir(model) else revision)


def _of_variable(error: Exception) -> Exception:
    """Say of an error that the recipe is the variable's, if it is."""
    if not (name := os.environ.get(RECIPE_VARIABLE)):
        return error
    return ValueError(f"{RECIPE_VARIABLE}={name}: {error}\nUnset {RECIPE_VARIABLE} to serve dense.")


@functools.lru_cache(maxsize=8)  # an engine looks several times, and the hub may be far
def _beside(model: str, revision: str | None) -> PruningRecipe | None:
    try:
        return PruningRecipe.from_pretrained(model, revision=revision)
    except FileNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        if os.path.isdir(model):
            raise
        logger.info("fitprune: could not look for a recipe beside %s, which runs dense: %s", model, error)
        return None
