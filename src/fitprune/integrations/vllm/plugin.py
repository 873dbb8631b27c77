"""The plug-in: finds the recipe that is configured, and has each worker prune by it."""

from __future__ import annotations

import functools
import os
from typing import Any

from huggingface_hub.errors import HFValidationError
from vllm.logger import init_logger

from fitprune.families.config import fingerprint_of
from fitprune.integrations.vllm.checkpoint import accept_newer_names
from fitprune.integrations.vllm.pruner import Pruner
from fitprune.integrations.vllm.rules import require_runner, require_supported
from fitprune.recipes.find import RECIPE_VARIABLE, fitted_to
from fitprune.recipes.recipe import PruningRecipe

logger = init_logger("vllm.fitprune")  # vLLM shows the lines of its own loggers alone


def install() -> None:
    """Have workers of this process prune, if a recipe is configured for the model that they load."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase.init_device, "__wrapped__"):
        return

    init_device, initialize_from_config = WorkerWrapperBase.init_device, WorkerWrapperBase.initialize_from_config

    @functools.wraps(init_device)
    def checked(self: Any) -> Any:
        recipe = configured_recipe(self.vllm_config)
        if recipe is not None:
            require_supported(self.vllm_config, recipe)
            accept_newer_names(self.vllm_config.model_config)
        result = init_device(self)
        if recipe is not None:
            require_runner(self.worker.model_runner)
        self.fitprune_recipe = recipe
        return result

    @functools.wraps(initialize_from_config)
    def hooked(self: Any, kv_cache_configs: list[Any]) -> Any:
        result = initialize_from_config(self, kv_cache_configs)
        if self.fitprune_recipe is not None:
            Pruner(self.worker.model_runner, self.fitprune_recipe)
        return result

    WorkerWrapperBase.init_device, WorkerWrapperBase.initialize_from_config = checked, hooked


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
    fingerprint = fingerprint_of(model.hf_config)
    if name := os.environ.get(RECIPE_VARIABLE):
        try:
            return fitted_to(PruningRecipe.named(name), fingerprint, force=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{RECIPE_VARIABLE}={name}: {error}\nUnset {RECIPE_VARIABLE} to serve dense.") from error
    folder = os.path.isdir(model.model)
    try:
        recipe = PruningRecipe.from_pretrained(model.model, revision=None if folder else model.revision)
    except FileNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        if folder:
            raise
        logger.info("fitprune: could not look for a recipe beside %s, which runs dense: %s", model.model, error)
        return None
    return fitted_to(recipe, fingerprint, force=False)
